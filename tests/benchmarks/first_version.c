// SPDX-License-Identifier: GPL-2.0-only
/*
 * A hash map for comparison, as in a simple BCC program: the key is the whole address
 * pair. No program is attached; userspace fills the map.
 */
struct connection_key {
	__u8 local_address[16];
	__u8 remote_address[16];
	__u32 netns;
	__u16 local_port;
	__u16 remote_port;
};

struct connection_value {
	__u64 established_ns;
	__u32 socket;
	__u8 direction;
	__u8 pad[3];
};

BPF_F_TABLE("hash", struct connection_key, struct connection_value, tracked,
	    MAX_CONNECTIONS, BPF_F_NO_PREALLOC);
