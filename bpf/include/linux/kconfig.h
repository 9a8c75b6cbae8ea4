/* SPDX-License-Identifier: GPL-2.0-only */
/* BCC's prelude refuses to compile without it. */
#define CONFIG_BPF_SYSCALL 1
