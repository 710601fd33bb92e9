# SPDX-License-Identifier: Apache-2.0
"""`sentencekv plan`: what a model, a machine and a context ask for, by the code's own sizes."""
