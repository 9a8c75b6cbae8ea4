/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the BPF program and its readers agree on. tcpexporter/connections/record.py
 * mirrors these structs; tests/unit/connections/test_record.py compares the layouts.
 */
#ifndef TCP_TRACKER_H
#define TCP_TRACKER_H

/* What a connection is known by. It has no padding: every byte is compared. */
struct connection_key {
	__u8 local_address[16]; /* network byte order, IPv4 as ::ffff:a.b.c.d */
	__u8 remote_address[16];
	__u32 netns;	  /* inode of the network namespace, never 0 */
	__u16 local_port; /* host byte order */
	__u16 remote_port;
};

#define GROUP_IPV6 0x10000 /* on the wire: an IPv4 client of :: has it not */
#define GROUP_OUTBOUND 0x20000
#define GROUPS 0x40000

/*
 * A place for a connection, a cache line. Userspace has the array of them mapped and
 * counts in it, at any time: so `group` is the last word that is written when a
 * connection opens and the only one when it closes.
 */
struct connection {
	__u64 established_ns; /* CLOCK_BOOTTIME */
	__u64 handle;	      /* what has this slot, 0: nothing */
	struct connection_key key;
	__u32 group; /* local port and GROUP_ bits, 0: no connection is here */
	__u32 pad;   /* zero */
};

/* In the handle of a connection from the socket tables; that of a socket is even. */
#define HANDLE_SEEDED 1

/* Slots that are free: the first, above 8 bits, and how many follow. */
#define RANGE_BITS 8
#define RANGE_MASK 0xff

/* What the program did, counted on each CPU. */
struct tracker_events {
	__u64 inserted;
	__u64 removed;
	__u64 refused;	     /* there was no slot for it */
	__u64 removed_seeds; /* of those removed */
	__u64 taken;	     /* slots */
	__u64 forgotten;     /* closings that there was no room to note */
};

#endif
