//! From a checkpoint to tokens: reads each rank's slices, runs step plans on a backend, samples. Knows neither Kubernetes
//! nor gRPC; KV leaves and enters through the KV cache's reads and writes that the worker moves over its own sockets.
