"""The gRPC services: workers that wait are matched with ready work."""
