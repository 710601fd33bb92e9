# SPDX-License-Identifier: Apache-2.0
"""`sentencekv doctor`: what is installed, built and registered, and whether it answers rightly."""
