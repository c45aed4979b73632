# SPDX-License-Identifier: Apache-2.0
"""LMDeploy TurboMind's parameters, cache iterators and entry points."""
