/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the BPF program and its readers agree on. tcpexporter/connections.py
 * mirrors these structs; tests/unit/test_connections.py compares the layouts.
 */
#ifndef TCP_TRACKER_H
#define TCP_TRACKER_H

/* What a connection is known by. It has no padding: every byte is compared. */
struct connection_key {
	__u8 local_address[16]; /* network byte order, IPv4 as ::ffff:a.b.c.d */
	__u8 remote_address[16];
	__u32 netns;	  /* inode of the network namespace, 0: not known */
	__u16 local_port; /* host byte order */
	__u16 remote_port;
};

enum direction {
	DIRECTION_INBOUND = 1,
	DIRECTION_OUTBOUND = 2,
};

/* What is known about it. */
struct connection_value {
	__u64 established_ns; /* CLOCK_BOOTTIME */
	__u32 socket;	      /* low half of the socket's address, 0: not known */
	__u8 direction;	      /* enum direction */
	__u8 pad[3];	      /* zero */
};

/* What the program did, counted on each CPU. */
struct tracker_events {
	__u64 inserted;
	__u64 removed;
	__u64 refused; /* the map was full */
};

#endif
