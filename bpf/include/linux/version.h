/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * BCC's prelude chooses by version between forms of its own macros. All that
 * this program uses is the same from 4.8 on, so no real version is needed.
 */
#ifndef _LINUX_VERSION_H
#define _LINUX_VERSION_H

#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(4, 8, 0)

#endif
