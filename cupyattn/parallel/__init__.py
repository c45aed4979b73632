# SPDX-License-Identifier: Apache-2.0
"""Several ranks: communicators, a layer's heads spread over them, a sequence's keys spread over them."""
