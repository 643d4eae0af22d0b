//! The process in a model pod: gRPC over an engine, KV transfer from rank to rank, drain.
