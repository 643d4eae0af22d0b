//! Runs a program, with a deadline.

use std::io::{Read, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::Deadline;

/// What a program that ended left.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit status 0.
    pub success: bool,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Finished {
    /// The output of a program that succeeded; its errors otherwise.
    pub fn checked(self) -> Result<String> {
        if self.success { Ok(self.out) } else { bail!("{}", self.err.trim_end()) }
    }
}

/// Runs it to its end; one that takes longer is killed, and is an error.
pub fn run(command: &mut Command, input: &str, within: Duration) -> Result<Finished> {
    let deadline = Deadline::after(within);
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_owned();
        // A program that does not read all of its input has its reasons, and says them.
        thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    }
    let (out, err) = (whole(child.stdout.take()), whole(child.stderr.take()));
    let (out, err) = (out.recv_timeout(deadline.left()), err.recv_timeout(deadline.left()));
    let (Ok(out), Ok(err)) = (out, err) else {
        // Gone already is as good.
        let _ = child.kill();
        child.wait().with_context(|| format!("cannot wait for {program}"))?;
        bail!("{program} did not end within {} s", within.as_secs());
    };
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    Ok(Finished { success: status.success(), out, err })
}

fn whole(pipe: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What came before an error is worth more than the error.
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_mins(1);

    #[test]
    fn input_goes_in_and_output_comes_out() {
        let finished =
            run(Command::new("sh").args(["-c", "cat; echo no >&2; exit 3"]), "yes", PATIENCE).unwrap();
        assert_eq!((finished.success, finished.out.as_str()), (false, "yes"));
        assert_eq!(finished.checked().unwrap_err().to_string(), "no");
    }

    #[test]
    fn one_that_hangs_is_killed() {
        let error = run(Command::new("sleep").arg("3600"), "", Duration::from_millis(10)).unwrap_err();
        assert_eq!(error.to_string(), "sleep did not end within 0 s");
    }
}
