/* SPDX-License-Identifier: GPL-2.0-only */
/* Empty: BCC's prelude includes this file, but our program does not use it. */
