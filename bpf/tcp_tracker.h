/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The layout of the maps. record.py and series.py in tcpexporter/connections define the
 * same structs for userspace; tests/unit/connections/test_record.py compares them.
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

/*
 * What is counted separately. A part that the settings do not require is 0. It has no
 * padding, because it is a key of a hash map. All fields are in network byte order, so
 * that userspace can sort series as bytes. `ip_version` is never 0.
 */
struct series_key {
	__be64 cgroup; /* number of the socket's cgroup (version 2) */
	__be32 netns;  /* inode of the network namespace */
	__be16 port;
	__u8 flags;	 /* SERIES_ bits */
	__u8 ip_version; /* 4 or 6, on the wire: 4 for an IPv4 client of :: */
};

#define SERIES_OUTBOUND 1
#define SERIES_REMOTE_PORT 2 /* `port` is the remote port */
#define SERIES_FOLDED 4	     /* adds up connections of other series */
#define SERIES_OWN 8	     /* the exporter's own listener, which is not counted */

/*
 * Each series has a number. Number 0 means no series. The numbers below SERIES_FIRST
 * are those of the folded series: 1 + (IPv6) + 2 * (outbound).
 */
#define SERIES_BITS 18
#define SERIES_MASK 0x3ffff
#define SERIES_FIRST 5

/* Times are CLOCK_BOOTTIME in units of 2^13 ns (8.2 us): 46 bits are 18 years. */
#define TIME_SHIFT 13

/*
 * A slot for one connection; its size is one cache line. Another array has one word for
 * each slot: time << SERIES_BITS | number. The word says whether the slot has a
 * connection, since when, and in which series. So one store opens a connection, one
 * store closes it, and userspace counts a million connections by reading 8 MB. The word
 * of a slot without connection is CLOSED, or 0 if the slot was never used; the number
 * in both is 0.
 */
struct connection {
	__u64 handle; /* the socket's address, or the hash of a seed; 0: none */
	struct connection_key key;
	__u32 is_outbound; /* 0 or 1 */
	__u32 pad;	   /* zero */
	__u64 cgroup;	   /* number of the socket's cgroup; 0: unknown */
};

#define CLOSED (1ULL << SERIES_BITS)

/*
 * What has happened in a series. Both ends of a loopback connection count. In an entry
 * of `corrections`, the first word of `series` is the number of pre-existing
 * connections.
 */
struct ledger_entry {
	struct series_key series; /* all zero: the number is free */
	__u64 opened;
	__u64 closed;
	__u64 failed; /* outbound attempts that ended before ESTABLISHED */
#ifdef BUCKETS
	__u64 lifetimes_sum;	  /* of the closed connections, in units of time */
	__u64 lifetimes[BUCKETS]; /* how many fell between two bounds */
#endif
};

/* Set in the handle of a seed; the handle of a socket is its address, which is even. */
#define HANDLE_SEEDED 1

/* A range of free slots or series numbers: first << RANGE_BITS | how many follow it. */
#define RANGE_BITS 8
#define RANGE_MASK 0xff

/* Counts of what the program has done; each CPU has its own. */
struct tracker_events {
	__u64 inserted;
	__u64 removed;
	__u64 refused;		/* connections for which no slot was free */
	__u64 removed_seeds;	/* seeds; `removed` includes them */
	__u64 allocated;	/* slots that were allocated */
	__u64 unrecorded;	/* closings that did not fit into the closings log */
	__u64 listener_changes; /* listeners that appeared or disappeared */
};

#endif
