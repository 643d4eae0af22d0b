//! Runs the steps of a check and reports each in one line; what a failing step printed is shown whole.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Of a command's output, read and not shown.
const LINES_AHEAD: usize = 256;
/// For a line, before a look at whether the command has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// For the rest of the output of a command that has ended: a process it left behind may hold it for ever.
const LEFT_OPEN: Duration = Duration::from_secs(5);

/// What a step found. A step that is one check counts one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// Why something did not run, one line each; `ignored` counts those without a reason.
    pub(crate) skipped: Vec<String>,
    pub(crate) ignored: usize,
    /// A few words after the name: what was cached, how much was compiled.
    pub(crate) note: String,
    /// Everything the step printed; shown when it fails.
    pub(crate) output: String,
}

impl Outcome {
    /// One check that cannot run here.
    pub(crate) fn skip(why: String) -> Self {
        Self { skipped: vec![why], ..Self::default() }
    }

    pub(crate) fn one(success: bool, note: String, output: String) -> Self {
        Self { passed: usize::from(success), failed: usize::from(!success), note, output, ..Self::default() }
    }
}

/// A named check.
pub(crate) struct Step<'a> {
    name: &'static str,
    run: Box<dyn FnOnce() -> Outcome + Send + 'a>,
}

impl<'a> Step<'a> {
    pub(crate) fn new(name: &'static str, run: impl FnOnce() -> Outcome + Send + 'a) -> Self {
        Self { name, run: Box::new(run) }
    }

    /// A command that is one check.
    pub(crate) fn command(name: &'static str, command: Command) -> Self {
        Self::new(name, move || {
            let (success, output) = run(command);
            Outcome::one(success, compiled(&output), output)
        })
    }
}

/// Runs lanes side by side, the steps of a lane one after the other. Its last line is the sum of all.
pub(crate) fn run_lanes(lanes: Vec<Vec<Step<'_>>>) -> ExitCode {
    run_phases(vec![lanes])
}

/// Runs phases one after the other, the lanes of each side by side. Its last line is the sum of all.
pub(crate) fn run_phases(phases: Vec<Vec<Vec<Step<'_>>>>) -> ExitCode {
    let mut total = Outcome::default();
    for lanes in phases {
        run_phase(lanes, &mut total);
    }
    println!("{}", summary(&total));
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_phase(lanes: Vec<Vec<Step<'_>>>, total: &mut Outcome) {
    let (report, reports) = mpsc::channel();
    thread::scope(|scope| {
        for lane in lanes {
            let report = report.clone();
            scope.spawn(move || {
                for Step { name, run } in lane {
                    let _ = report.send((name, None));
                    let start = Instant::now();
                    let outcome = run();
                    let _ = report.send((name, Some((outcome, start.elapsed()))));
                }
            });
        }
        drop(report);
        for (name, done) in reports {
            match done {
                None => println!("start    {name}"),
                Some((outcome, time)) => add(total, name, outcome, time),
            }
        }
    });
}

/// Prints a step's line, and counts it.
fn add(total: &mut Outcome, name: &str, outcome: Outcome, time: Duration) {
    let Outcome { passed, failed, skipped, ignored, note, output } = outcome;
    if failed > 0 {
        println!("---- {name} printed ----\n{}\n---- end of {name} ----", output.trim_end());
    }
    let state = if failed > 0 {
        "FAILED"
    } else if passed == 0 {
        "skipped"
    } else {
        "ok"
    };
    let mut line = format!("{state:8} {name:14} {:7.1} s", time.as_secs_f64());
    if passed + failed > 1 {
        let _ = write!(line, "  {passed} passed, {failed} failed");
    }
    if !note.is_empty() {
        let _ = write!(line, "  ({note})");
    }
    println!("{line}");
    for why in &skipped {
        println!("         skipped: {why}");
    }
    total.passed += passed;
    total.failed += failed;
    total.ignored += ignored;
    total.skipped.extend(skipped);
}

fn summary(total: &Outcome) -> String {
    let Outcome { passed, failed, skipped, ignored, .. } = total;
    match skipped.len() + ignored {
        0 => format!("{passed} passed, {failed} failed"),
        skipped => format!("{passed} passed, {failed} failed, {skipped} skipped"),
    }
}

/// Runs a command to its end; whether it succeeded, and what it printed on both streams, in order.
pub(crate) fn run(command: Command) -> (bool, String) {
    run_watched(command, |_| {})
}

/// Runs a command, and shows each line as it comes.
pub(crate) fn run_watched(command: Command, show: impl FnMut(&str)) -> (bool, String) {
    run_reading(command, Stdio::null(), show)
}

/// Runs a command with something as its standard input, and shows each line as it comes.
pub(crate) fn run_reading(mut command: Command, input: Stdio, mut show: impl FnMut(&str)) -> (bool, String) {
    let mut output = format!("$ {}\n", line_of(&command));
    let result = (|| -> io::Result<(ExitStatus, bool)> {
        let (reader, writer) = io::pipe()?;
        command.stdin(input).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn()?;
        // The command holds the other ends of the pipe: without this the reader would wait for itself.
        drop(command);
        let lines = lines_of(reader);
        let mut ended: Option<(ExitStatus, Instant)> = None;
        loop {
            match lines.recv_timeout(LOOK_AGAIN) {
                Ok(line) => {
                    show(line.trim());
                    output += &line;
                }
                Err(RecvTimeoutError::Disconnected) => return Ok((child.wait()?, true)),
                Err(RecvTimeoutError::Timeout) => {}
            }
            match ended {
                None => ended = child.try_wait()?.map(|status| (status, Instant::now())),
                Some((status, at)) if at.elapsed() > LEFT_OPEN => return Ok((status, false)),
                Some(_) => {}
            }
        }
    })();
    match result {
        Ok((_, false)) => {
            (false, format!("{output}it has ended, and a process that it left behind holds its output\n"))
        }
        Ok((status, true)) if status.success() => (true, output),
        Ok((status, true)) => (false, format!("{output}{status}\n")),
        Err(error) => (false, format!("{output}cannot run it: {error}\n")),
    }
}

/// Lines as they come. Its reader ends with the last process that can write.
fn lines_of(reader: io::PipeReader) -> Receiver<String> {
    let (sender, lines) = sync_channel(LINES_AHEAD);
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        // What cannot be read has no more to say.
        while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

/// A command as one would type it.
fn line_of(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let program = program.file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// How much cargo had to build.
pub(crate) fn compiled(output: &str) -> String {
    let verbs = ["Compiling ", "Checking ", "Documenting "];
    let built =
        output.lines().filter(|line| verbs.iter().any(|verb| line.trim_start().starts_with(verb))).count();
    let is_build = output.lines().any(|line| line.trim_start().starts_with("Finished "));
    match built {
        0 if is_build => "build cached".to_owned(),
        0 => String::new(),
        built => format!("built {built} crates"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_skipped_checks_only_if_there_are_some() {
        let total = Outcome { passed: 3, failed: 1, ..Outcome::default() };
        assert_eq!(summary(&total), "3 passed, 1 failed");
        let total = Outcome { skipped: vec!["no network".into()], ignored: 1, ..total };
        assert_eq!(summary(&total), "3 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn a_command_gives_its_status_and_both_streams() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            run(command)
        };
        assert_eq!(shell("echo a; echo b >&2"), (true, "$ sh -c echo a; echo b >&2\na\nb\n".into()));
        let (success, output) = shell("echo a; exit 3");
        assert!(!success && output.ends_with("a\nexit status: 3\n"), "{output}");
        let (success, output) = shell("echo a; sleep 30 &");
        assert!(
            !success && output.contains("a\nit has ended, and a process that it left behind"),
            "{output}"
        );
        let (success, output) = run(Command::new("/nonexistent/tool"));
        assert!(!success && output.contains("cannot run it"), "{output}");
    }

    #[test]
    fn says_what_was_built() {
        assert_eq!(
            compiled("   Compiling a v1\n    Checking b v2\n    Finished `release`\n"),
            "built 2 crates"
        );
        assert_eq!(compiled("    Finished `release` profile\n"), "build cached");
        assert_eq!(compiled("licenses ok\n"), "");
    }
}
