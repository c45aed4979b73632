# SPDX-License-Identifier: Apache-2.0
"""From a batch of queries, keys and lengths to launches of the attention kernels.

`attend` is the road both ops take: `args` (checks, the kernels' struct), `scheduling` and `work_list` (who attends
what), `plans` (which kernel, how it is launched). `step` is what a batch's lengths say once for all layers.
"""
