"""The gRPC services: waiting workers are matched with ready work; translate, call the store, translate back."""
