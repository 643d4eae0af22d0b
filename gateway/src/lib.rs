//! The front door: gRPC and OpenAI HTTP in, token ids to the gangs, text out.
