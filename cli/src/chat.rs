//! `herd chat`: a conversation on the terminal, or one line an answer from a pipe.

mod client;

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::net::SocketAddr;

use anyhow::Context as _;
use clap::Args;
use futures::StreamExt as _;
use tokio::sync::mpsc;

use self::client::{Client, Turn};

#[derive(Debug, Args)]
pub(crate) struct ChatArguments {
    /// An OpenAI server
    #[arg(long, default_value = "http://127.0.0.1:8080", conflicts_with = "grpc")]
    url: String,
    /// A Herd gateway's gRPC address, instead
    #[arg(long)]
    grpc: Option<SocketAddr>,
    /// Model to talk to; the first one served unless given
    #[arg(long)]
    model: Option<String>,
    /// Instructions before the conversation
    #[arg(long)]
    system: Option<String>,
    /// 0 always gives the likeliest answer
    #[arg(long, default_value_t = 1.0)]
    temperature: f32,
    /// Longest answer, in tokens; as long as the model can unless given
    #[arg(long)]
    max_tokens: Option<u32>,
}

/// Until the end of the input.
pub(crate) fn run(arguments: ChatArguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(converse(arguments));
    // A thread may still wait for a line.
    runtime.shutdown_background();
    ended
}

async fn converse(arguments: ChatArguments) -> anyhow::Result<()> {
    let ChatArguments { url, grpc, model, system, temperature, max_tokens } = arguments;
    let mut client = match grpc {
        Some(address) => Client::grpc(address).await?,
        None => Client::http(&url)?,
    };
    let model = match model {
        Some(model) => model,
        None => client.models().await?.into_iter().next().context("the server has no model")?,
    };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("{model}. Ctrl-C stops an answer, Ctrl-D ends.");
    }
    let mut lines = lines();
    let mut turns: Vec<Turn> = system.map(Turn::system).into_iter().collect();
    loop {
        prompt(interactive);
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = tokio::signal::ctrl_c() => {
                eprintln!();
                if interactive {
                    continue;
                }
                break;
            }
        };
        let Some(line) = line else { break };
        if line.trim().is_empty() {
            continue;
        }
        turns.push(Turn::user(line));
        match answer(&mut client, &model, &turns, temperature, max_tokens).await {
            Ok(text) if !text.is_empty() => turns.push(Turn::assistant(text)),
            Ok(_) => drop(turns.pop()),
            Err(error) if interactive => {
                eprintln!("error: {error:#}");
                turns.pop();
            }
            Err(error) => return Err(error),
        }
    }
    if interactive {
        eprintln!();
    }
    Ok(())
}

fn prompt(interactive: bool) {
    if interactive {
        eprint!("> ");
    }
}

/// Prints an answer as it comes; Ctrl-C ends it, and what was said counts.
async fn answer(
    client: &mut Client,
    model: &str,
    turns: &[Turn],
    temperature: f32,
    max_tokens: Option<u32>,
) -> anyhow::Result<String> {
    let ask = client::Ask { model, turns, temperature, max_tokens };
    let mut said = String::new();
    let stop = tokio::signal::ctrl_c();
    tokio::pin!(stop);
    let mut pieces = tokio::select! {
        pieces = client.answer(ask) => pieces?,
        _ = &mut stop => return Ok(said),
    };
    let mut out = std::io::stdout();
    loop {
        let piece = tokio::select! {
            piece = pieces.next() => piece,
            _ = &mut stop => None,
        };
        let Some(piece) = piece else { break };
        let piece = piece?;
        out.write_all(piece.as_bytes())?;
        out.flush()?;
        said.push_str(&piece);
    }
    writeln!(out)?;
    Ok(said)
}

/// Reading a terminal blocks, so it has a thread; one line is read ahead.
fn lines() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
