"""Everything that time moves: delays, expiry, leases, the de-duplication window."""
