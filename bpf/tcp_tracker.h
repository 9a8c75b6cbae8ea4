/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The layout of the maps, for the BPF program and userspace. These structs have a
 * mirror in tcpexporter/connections/record.py; tests/unit/connections/test_record.py
 * compares the two.
 */
#ifndef TCP_TRACKER_H
#define TCP_TRACKER_H

/* Identifies a connection. It has no padding, because every byte is compared. */
struct connection_key {
	__u8 local_address[16]; /* network byte order, IPv4 as ::ffff:a.b.c.d */
	__u8 remote_address[16];
	__u32 netns;	  /* inode of the network namespace, never 0 */
	__u16 local_port; /* host byte order */
	__u16 remote_port;
};

#define GROUP_IPV6 0x10000 /* on the wire: not an IPv4 client of :: */
#define GROUP_OUTBOUND 0x20000
#define GROUPS 0x40000

/*
 * A slot for a connection, one cache line. Userspace maps the array of slots and reads
 * it at any time. So the program writes `group` last when a connection opens, and
 * writes nothing else when it closes.
 */
struct connection {
	__u64 established_ns; /* CLOCK_BOOTTIME */
	__u64 handle;	      /* identifies the owner of this slot, 0: none */
	struct connection_key key;
	__u32 group; /* local port and GROUP_ bits, 0: no connection */
	__u32 pad;   /* zero */
};

/* Set in the handle of a seed; the handle of a socket is its address, which is even. */
#define HANDLE_SEEDED 1

/* A range of free slots: the first slot, above the number of slots that follow it. */
#define RANGE_BITS 8
#define RANGE_MASK 0xff

/* What the program has done, counted on each CPU. */
struct tracker_events {
	__u64 inserted;
	__u64 removed;
	__u64 refused;	     /* openings, because no slot was free */
	__u64 removed_seeds; /* part of `removed` */
	__u64 allocated;     /* slots */
	__u64 unrecorded;    /* closings, because the closings log was full */
};

#endif
