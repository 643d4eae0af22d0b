//! What a Llama model is, before any byte of it is loaded: configuration, shard plan, bytes per rank, KV layout and transfer
//! plan, digests and fingerprints. Knows no file, thread or socket.
