//! `herd-worker fetch` and what belongs to it: tasks of a pod that end before it serves.

use std::env;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser};
use herd_worker::fetch::{
    BucketOptions, FetchError, FetchOptions, HubOptions, Retry, Secret, SourceOptions, fetch, resolve,
};
use herd_worker::{StopSignals, TerminationMessage};

use crate::{LogFormat, size, start_logging};

/// Seconds. A download goes on through troubles of its source; a question that has no answer is to be told of soon.
const DOWNLOAD_PATIENCE: u64 = 600;
const QUESTION_PATIENCE: u64 = 30;

/// Tasks around models that are downloaded. Tokens and keys are read from `HF_TOKEN`, `AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`, servers from `HF_ENDPOINT`, `AWS_ENDPOINT_URL` and `AWS_REGION`.
#[derive(Debug, Parser)]
#[command(name = "herd-worker", version)]
pub(crate) enum Task {
    /// Downloads a model into a cache, or what is missing of it.
    Fetch(FetchArgs),
    /// Names the files that a source has now, in one line of JSON.
    Resolve(ResolveArgs),
    /// Makes a node's folder one that pods may write to; as root.
    PrepareCache(PrepareArgs),
    /// Does nothing until it is told to end.
    Pause,
}

#[derive(Debug, Args)]
pub(crate) struct SourceArgs {
    /// `hf://ORG/NAME[@REVISION]` or `s3://BUCKET[/PREFIX]`.
    #[arg(long, env = "HERD_MODEL_SOURCE")]
    source: String,
    /// Secret that tokens and keys are from, for messages.
    #[arg(long, env = "HERD_MODEL_SECRET")]
    secret: Option<String>,
    /// Seconds without progress after which it is given up; 600 for a download, 30 for a question, unless given.
    #[arg(long, env = "HERD_FETCH_PATIENCE")]
    patience: Option<u64>,
    /// Where the reason of a fatal error is written, if the file exists.
    #[arg(long, env = "HERD_TERMINATION_LOG", default_value = "/dev/termination-log")]
    termination_log: PathBuf,
    /// How log lines look; `RUST_LOG` says which.
    #[arg(long, env = "HERD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Debug, Args)]
pub(crate) struct ResolveArgs {
    #[command(flatten)]
    source: SourceArgs,
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// What `resolve` said.
    #[arg(long, env = "HERD_MODEL_PIN")]
    pin: String,
    /// Folder of all models.
    #[arg(long, env = "HERD_CACHE_DIR")]
    cache: PathBuf,
    /// This model's folder inside of it.
    #[arg(long, env = "HERD_CACHE_FOLDER")]
    folder: String,
    /// Of all models: bytes, or a number with Ki, Mi, Gi or Ti.
    #[arg(long, env = "HERD_CACHE_SIZE", value_parser = parse_size)]
    size: u64,
    /// Stages that the model is split into.
    #[arg(long, env = "HERD_PIPELINE", default_value_t = 1)]
    pipeline: usize,
    /// Which of them, counted from 0: only its files are downloaded.
    #[arg(long, env = "HERD_STAGE", default_value_t = 0)]
    stage: usize,
    /// Seconds to wait for another process that downloads the same.
    #[arg(long, env = "HERD_FETCH_WAIT", default_value_t = 7200)]
    wait: u64,
    /// Seconds after its last use for which a model is not removed.
    #[arg(long, env = "HERD_CACHE_GRACE", default_value_t = 900)]
    grace: u64,
}

#[derive(Debug, Args)]
pub(crate) struct PrepareArgs {
    /// The folder, which is there.
    #[arg(long, env = "HERD_CACHE_DIR")]
    cache: PathBuf,
    /// Whose it becomes, and of the group of the same number.
    #[arg(long, default_value_t = 65532)]
    user: u32,
}

/// The task that the command line asks for, unless it is to serve.
pub(crate) fn asked() -> Option<Task> {
    let first = env::args_os().nth(1)?;
    ["fetch", "resolve", "prepare-cache", "pause"].iter().any(|task| first == *task).then(Task::parse)
}

impl Task {
    pub(crate) fn run(self) -> ExitCode {
        let (log_format, termination_log) = match &self {
            Self::Fetch(FetchArgs { source, .. }) | Self::Resolve(ResolveArgs { source }) => {
                (source.log_format, Some(source.termination_log.clone()))
            }
            Self::PrepareCache(_) | Self::Pause => (LogFormat::Json, None),
        };
        start_logging(log_format);
        let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
        {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!("cannot start a runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
        let Err(error) = runtime.block_on(self.until_stopped()) else { return ExitCode::SUCCESS };
        let message = TerminationMessage::from(&error);
        tracing::error!(reason = message.reason, "{}", message.message);
        if let Some(Err(error)) = termination_log.map(|log| message.write(&log)) {
            tracing::error!("cannot write the termination message: {error}");
        }
        ExitCode::FAILURE
    }

    async fn until_stopped(self) -> Result<(), FetchError> {
        let mut signals = StopSignals::listen().map_err(|error| FetchError::Internal(error.to_string()))?;
        match self {
            Self::Fetch(args) => tokio::select! {
                ended = fetch(fetch_options(args)) => {
                    let fetched = ended?;
                    tracing::info!(fetched.bytes, fetched.downloaded, "the model is there");
                    Ok(())
                }
                () = signals.next() => Err(FetchError::Stopped),
            },
            Self::Resolve(ResolveArgs { source }) => {
                let log = source.termination_log.clone();
                tokio::select! {
                    ended = resolve(source_options(source, QUESTION_PATIENCE)) => {
                        let json = serde_json::to_string(&ended?);
                        tell(&json.map_err(|error| FetchError::Internal(error.to_string()))?, &log)
                    }
                    () = signals.next() => Err(FetchError::Stopped),
                }
            }
            Self::PrepareCache(args) => prepare(&args),
            Self::Pause => {
                signals.next().await;
                Ok(())
            }
        }
    }
}

/// To whoever called, and where the operator reads it.
#[expect(clippy::print_stdout, reason = "this is what the command is asked for")]
fn tell(json: &str, log: &Path) -> Result<(), FetchError> {
    println!("{json}");
    if log.exists() {
        let failed = |source| FetchError::Io { action: "write", path: log.to_owned(), source };
        std::fs::write(log, json).map_err(failed)?;
    }
    Ok(())
}

fn prepare(PrepareArgs { cache, user }: &PrepareArgs) -> Result<(), FetchError> {
    let failed = |action| move |source| FetchError::Io { action, path: cache.clone(), source };
    let now = std::fs::metadata(cache).map_err(failed("read"))?;
    if (now.uid(), now.gid()) != (*user, *user) {
        let entries = std::fs::read_dir(cache).map_err(failed("read"))?;
        let mut others = entries.flatten().filter(|entry| entry.file_name() != "lost+found");
        // A folder that others use is not taken from them.
        if others.next().is_some() {
            let problem = format!("{} belongs to user {} and is not empty", cache.display(), now.uid());
            return Err(FetchError::Option { option: "--cache", problem });
        }
        chown(cache, Some(*user), Some(*user)).map_err(failed("change the owner of"))?;
    }
    tracing::info!("pods of user {user} may write to {}", cache.display());
    Ok(())
}

fn source_options(args: SourceArgs, default_patience: u64) -> SourceOptions {
    let SourceArgs { source, secret, patience, termination_log: _, log_format: _ } = args;
    // One that is empty is one that is not given.
    let given = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let secret_of = |name: &str| given(name).map(Secret);
    SourceOptions {
        source,
        secret,
        hub: HubOptions { endpoint: given("HF_ENDPOINT"), token: secret_of("HF_TOKEN") },
        bucket: BucketOptions {
            endpoint: given("AWS_ENDPOINT_URL"),
            region: given("AWS_REGION"),
            access_key_id: secret_of("AWS_ACCESS_KEY_ID"),
            secret_access_key: secret_of("AWS_SECRET_ACCESS_KEY"),
            session_token: secret_of("AWS_SESSION_TOKEN"),
        },
        retry: Retry { limit: Duration::from_secs(patience.unwrap_or(default_patience)), ..Retry::default() },
    }
}

fn fetch_options(args: FetchArgs) -> FetchOptions {
    let FetchArgs { source, pin, cache, folder, size, pipeline, stage, wait, grace } = args;
    FetchOptions {
        source: source_options(source, DOWNLOAD_PATIENCE),
        pin,
        cache,
        folder,
        bound: size,
        stage: Some((stage, pipeline)),
        wait: Duration::from_secs(wait),
        grace: Duration::from_secs(grace),
    }
}

/// As Kubernetes writes sizes.
fn parse_size(text: &str) -> Result<u64, String> {
    let units = [
        ("", 1),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
    ];
    size::parse(text, &units, "Ki, Mi, Gi or Ti")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Task::command().debug_assert();
    }

    #[test]
    fn sizes_are_those_of_kubernetes() {
        assert_eq!(parse_size("500Gi"), Ok(500 << 30));
        assert_eq!(parse_size("2T"), Ok(2_000_000_000_000));
        assert_eq!(parse_size("7"), Ok(7));
        assert!(
            parse_size("1GiB").is_err() && parse_size("Gi").is_err() && parse_size("99999999Ti").is_err()
        );
    }
}
