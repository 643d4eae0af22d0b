//! A program whose output is read as it comes, with a deadline.

use std::io::{BufRead as _, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Pieces that may wait to be taken.
const AHEAD: usize = 16;

/// A running program; dropped, it is killed.
pub(crate) struct Stream<T> {
    child: Child,
    pieces: Receiver<T>,
    deadline: Instant,
}

impl<T: Send + 'static> Stream<T> {
    /// Starts a program, whose output `parse` cuts into pieces on a thread of its own.
    pub(crate) fn start(
        mut command: Command,
        within: Duration,
        parse: impl FnOnce(ChildStdout, &SyncSender<T>) + Send + 'static,
    ) -> Result<Self> {
        let name = command.get_program().display().to_string();
        let mut child =
            command.stdout(Stdio::piped()).spawn().with_context(|| format!("failed to run {name}"))?;
        let output = child.stdout.take().context("no output")?;
        let (sender, pieces) = mpsc::sync_channel(AHEAD);
        // It ends when the program does, which this owns.
        thread::spawn(move || parse(output, &sender));
        Ok(Self { child, pieces, deadline: Instant::now() + within })
    }

    /// The next piece; none at the end of the output.
    pub(crate) fn next(&mut self) -> Result<Option<T>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.pieces.recv_timeout(left) {
            Ok(piece) => Ok(Some(piece)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => bail!("too late"),
        }
    }

    /// The program's standard input, once.
    pub(crate) fn input(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// How the program ended, after the end of its output.
    pub(crate) fn ended(mut self) -> Result<std::process::ExitStatus> {
        self.child.wait().context("failed to wait")
    }
}

impl<T> Drop for Stream<T> {
    fn drop(&mut self) {
        // It has ended where there is nothing to kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Pieces of bytes as they come.
pub(crate) fn bytes(mut output: ChildStdout, pieces: &SyncSender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = output.read(&mut buffer) {
        if pieces.send(buffer[..read].to_vec()).is_err() {
            return;
        }
    }
}

/// One line after the other.
pub(crate) fn lines(output: ChildStdout, pieces: &SyncSender<String>) {
    for line in std::io::BufReader::new(output).lines().map_while(Result::ok) {
        if pieces.send(line).is_err() {
            return;
        }
    }
}

/// One JSON value after the other.
pub(crate) fn json(output: ChildStdout, pieces: &SyncSender<serde_json::Value>) {
    let reader = std::io::BufReader::new(output);
    for value in serde_json::Deserializer::from_reader(reader).into_iter() {
        let Ok(value) = value else { return };
        if pieces.send(value).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn values_come_one_by_one_until_the_end() {
        let mut stream = Stream::start(
            shell("echo '{\"a\": 1}'; echo '{\"a\":'; echo '2}'; exit 3"),
            Duration::from_mins(1),
            json,
        )
        .unwrap();
        assert_eq!(stream.next().unwrap().unwrap()["a"], 1);
        assert_eq!(stream.next().unwrap().unwrap()["a"], 2);
        assert!(stream.next().unwrap().is_none());
        assert_eq!(stream.ended().unwrap().code(), Some(3));
    }

    #[test]
    fn a_program_that_says_nothing_is_given_up() {
        let mut stream = Stream::start(shell("exec sleep 600"), Duration::ZERO, bytes).unwrap();
        assert_eq!(stream.next().unwrap_err().to_string(), "too late");
    }
}
