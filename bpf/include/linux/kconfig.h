/* SPDX-License-Identifier: GPL-2.0-only */
/* BCC's prelude does not compile without this macro. */
#define CONFIG_BPF_SYSCALL 1
