//! A KV transfer against bytes written to a TCP socket, both over the loopback interface, the same bytes in the same pieces.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use herd_engine::{Executor as _, FakeModel, FakeOptions, KvStore};
use herd_worker::transfer::Loopback;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::measure::Samples;

const ROUNDS: usize = 5;
/// One rank of eight of Llama 3.1 70B has one KV head; a rank that has all eight shows the same in larger frames.
const LAYERS: usize = 80;
const ROW_BYTES: usize = 128 * 2;
const BLOCK_TOKENS: usize = 64;
const PROMPT_TOKENS: usize = 4096;

pub(crate) async fn run() -> Result<Value> {
    println!("kv, {LAYERS} layers, {PROMPT_TOKENS} tokens, GB/s");
    println!("  {:>8}  {:>6}  {:>8}  {:>5}", "kv heads", "herd", "raw tcp", "ratio");
    let mut figures = Vec::new();
    for kv_heads in [1, 8] {
        let store = || -> Arc<dyn KvStore> {
            let kv_blocks = PROMPT_TOKENS / BLOCK_TOKENS;
            let options = FakeOptions {
                layers: LAYERS,
                kv_heads,
                row_bytes: ROW_BYTES,
                kv_blocks,
                block_tokens: BLOCK_TOKENS,
                ..FakeOptions::default()
            };
            Arc::clone(&FakeModel::new(options).kv()[0])
        };
        let (source, target) = (store(), store());
        let transfer = Loopback { block_tokens: BLOCK_TOKENS, prompt_tokens: PROMPT_TOKENS };
        let piece = 2 * kv_heads * BLOCK_TOKENS * ROW_BYTES;
        let pieces = LAYERS * PROMPT_TOKENS / BLOCK_TOKENS;
        let bytes = (piece * pieces) as f64;
        let (mut herd, mut raw) = (Samples::default(), Samples::default());
        for _ in 0..ROUNDS {
            let begun = Instant::now();
            transfer.send(&*source, Arc::clone(&target)).await?;
            herd.add(bytes / begun.elapsed().as_secs_f64() / 1e9);
            let begun = Instant::now();
            tcp(piece, pieces).await?;
            raw.add(bytes / begun.elapsed().as_secs_f64() / 1e9);
        }
        let (herd, raw) = (herd.median(), raw.median());
        println!("  {kv_heads:>8}  {herd:>6.2}  {raw:>8.2}  {:>5.2}", herd / raw);
        figures.push(json!({
            "kv_heads": kv_heads, "bytes": bytes, "herd_gb_s": herd, "tcp_gb_s": raw, "ratio": herd / raw,
        }));
    }
    Ok(Value::Array(figures))
}

async fn tcp(piece: usize, pieces: usize) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let reader = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        let (mut buffer, mut read) = (vec![0; piece], 0);
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok::<_, std::io::Error>(read),
                more => read += more,
            }
        }
    });
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let data = vec![1; piece];
    for _ in 0..pieces {
        stream.write_all(&data).await?;
    }
    drop(stream);
    let read = reader.await??;
    ensure!(read == piece * pieces, "{read} of {} bytes came", piece * pieces);
    Ok(())
}
