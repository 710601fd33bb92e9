# SPDX-License-Identifier: Apache-2.0
"""What a model looked at while it answered: recorded in an engine of this process, as a page."""
