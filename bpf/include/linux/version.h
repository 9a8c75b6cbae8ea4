/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * BCC's prelude chooses the forms of its macros by this version. The macros that this
 * program uses are the same from 4.8 on, so this need not be the kernel's version.
 */
#ifndef _LINUX_VERSION_H
#define _LINUX_VERSION_H

#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(4, 8, 0)

#endif
