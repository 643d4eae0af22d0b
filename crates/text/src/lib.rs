//! Text on the gateway's side: tokenizer, chat templates, stop strings, UTF-8 streaming. Pure: files come in as bytes.
