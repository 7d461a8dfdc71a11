"""How activations come in, from Kafka and over gRPC, and how dead letters leave."""
