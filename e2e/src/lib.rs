//! Drives a cluster as a user would.
