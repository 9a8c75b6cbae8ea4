/* SPDX-License-Identifier: GPL-2.0-only */
/* Nothing: BCC's prelude asks for it and this program needs none of it. */
