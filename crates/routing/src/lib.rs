//! Which gangs take a request: pure functions over a snapshot of the fleet.
