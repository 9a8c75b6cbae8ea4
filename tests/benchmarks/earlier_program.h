/* SPDX-License-Identifier: GPL-2.0-only */
/* The layout of the maps of earlier_program.c, to compare: make bench loads it. */
/*
 * The layout of the maps. tcpexporter/connections/record.py defines the same structs
 * for userspace; tests/unit/connections/test_record.py compares the two.
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

#define GROUP_IPV6 0x10000 /* IPv6 on the wire; not set for an IPv4 client of :: */
#define GROUP_OUTBOUND 0x20000
#define GROUPS 0x40000

/*
 * A slot for a connection: one cache line. Userspace maps the array of slots and reads
 * it at any time. So the program writes `group` last when a connection opens, and
 * writes only `group` when it closes.
 */
struct connection {
	__u64 established_ns; /* CLOCK_BOOTTIME */
	__u64 handle;	      /* the socket's address, or the hash of a seed; 0: none */
	struct connection_key key;
	__u32 group; /* local port and GROUP_ bits; 0: no connection */
	__u32 pad;   /* zero */
};

/* Set in the handle of a seed; the handle of a socket is its address, which is even. */
#define HANDLE_SEEDED 1

/* A range of free slots: its low RANGE_BITS bits are its length minus 1; above them is
 * the first slot. */
#define RANGE_BITS 8
#define RANGE_MASK 0xff

/* Counts of what the program has done; each CPU has its own. */
struct tracker_events {
	__u64 inserted;
	__u64 removed;
	__u64 refused;	     /* connections for which no slot was free */
	__u64 removed_seeds; /* seeds; `removed` includes them */
	__u64 allocated;     /* slots */
	__u64 unrecorded;    /* closings that did not fit into the closings log */
};

#endif
