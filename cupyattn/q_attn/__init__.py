# SPDX-License-Identifier: Apache-2.0
"""QAttn, the attention part of a decoder layer, with ExLlamaV2's arguments.

`layer` is the class; a call goes through `step` (what the batch means), `projections`, `attend` and again
`projections`; `repeats` launches again what a step like an earlier one would launch.
"""
