//! Makes the connections of an epoch: the process with the higher ranks connects, the other one knows it by its hello.
//!
//! A hello is 40 bytes: `HRKH`, version (2), 0 (2), epoch (8), first rank of the sender (2), first rank that is meant (2),
//! gang (16, a hash of its id), CRC-32 (4) of what stands before it. It is answered by `HRKA`.

use std::io;
use std::ops::Range;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::PROTOCOL_VERSION;
use super::mesh::Link;
use crate::net::connect_rank;
use crate::transfer::{u16_at, u32_at, u64_at};

const HELLO_BYTES: usize = 40;
const HELLO_MAGIC: [u8; 4] = *b"HRKH";
const ACCEPTED: [u8; 4] = *b"HRKA";
const CRC_AT: usize = HELLO_BYTES - 4;

/// For all connections of an epoch to be made: every process was there a moment ago.
const CONNECT_ALL_DEADLINE: Duration = Duration::from_secs(15);
/// For the other process to say who it is.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Before a connection that failed is tried again: the other process may hear of the epoch a little later.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// Connections that have not said yet who they are.
const MAX_UNKNOWN: usize = 64;

/// A process of a gang.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) ranks: Range<usize>,
    /// "host:port" of its listener for ranks.
    pub(super) endpoint: String,
}

/// Connections that could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("ranks {ranks:?} at {endpoint} are not reached within {CONNECT_ALL_DEADLINE:?}: {problem}")]
    Unreached { ranks: Range<usize>, endpoint: String, problem: String },
    #[error("ranks {0:?} do not connect within {CONNECT_ALL_DEADLINE:?}")]
    Missing(Range<usize>),
    #[error("cannot listen for the other ranks of the gang: {0}")]
    Listen(#[from] io::Error),
}

/// Who connects to whom, in which epoch of which gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hello {
    epoch: u64,
    from: u16,
    to: u16,
    gang: [u8; 16],
}

impl Hello {
    fn encode(&self) -> [u8; HELLO_BYTES] {
        let Self { epoch, from, to, gang } = self;
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..4].copy_from_slice(&HELLO_MAGIC);
        bytes[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
        bytes[16..18].copy_from_slice(&from.to_le_bytes());
        bytes[18..20].copy_from_slice(&to.to_le_bytes());
        bytes[20..CRC_AT].copy_from_slice(gang);
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let sound = bytes[0..4] == HELLO_MAGIC
            && u16_at(bytes, 4) == PROTOCOL_VERSION
            && bytes[6..8] == [0, 0]
            && crc32fast::hash(&bytes[..CRC_AT]) == u32_at(bytes, CRC_AT);
        let gang = bytes[20..CRC_AT].try_into().ok()?;
        let (epoch, from, to) = (u64_at(bytes, 8), u16_at(bytes, 16), u16_at(bytes, 18));
        sound.then_some(Self { epoch, from, to, gang })
    }
}

fn gang_hash(gang_id: &str) -> [u8; 16] {
    Sha256::digest(gang_id).first_chunk().copied().unwrap_or_default()
}

/// Connects this process, whose ranks are `own`, to all other `members`. Connections of other epochs and of strangers are
/// closed.
pub(super) async fn connect_all(
    listener: &TcpListener,
    gang_id: &str,
    epoch: u64,
    own: &Range<usize>,
    members: &[Member],
) -> Result<Vec<Link>, ConnectError> {
    let until = Instant::now() + CONNECT_ALL_DEADLINE;
    let others = members.iter().filter(|member| member.ranks != *own).cloned();
    let (lower, higher): (Vec<Member>, Vec<Member>) =
        others.partition(|member| member.ranks.start < own.start);
    let (own, gang) = (own.start as u16, gang_hash(gang_id));
    let mut connecting = JoinSet::new();
    for member in lower {
        let hello = Hello { epoch, from: own, to: member.ranks.start as u16, gang };
        connecting.spawn(connect(member, hello, until));
    }
    let expected = Hello { epoch, from: 0, to: own, gang };
    let accepted = accept(listener, expected, &higher, until);
    let connected = async {
        let mut links = Vec::new();
        while let Some(link) = connecting.join_next().await {
            links.push(link.map_err(|error| io::Error::other(error.to_string()))??);
        }
        Ok::<_, ConnectError>(links)
    };
    let (mut links, connected) = tokio::try_join!(accepted, connected)?;
    links.extend(connected);
    links.sort_by_key(|link| link.ranks.start);
    Ok(links)
}

async fn connect(member: Member, hello: Hello, until: Instant) -> Result<Link, ConnectError> {
    loop {
        let Member { ranks, endpoint } = &member;
        let problem = match timeout_at(until, introduce(endpoint, &hello)).await {
            Ok(Ok(stream)) => return Ok(Link { ranks: ranks.clone(), stream }),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if Instant::now() + TRY_AGAIN >= until {
            return Err(ConnectError::Unreached {
                ranks: ranks.clone(),
                endpoint: endpoint.clone(),
                problem,
            });
        }
        sleep(TRY_AGAIN).await;
    }
}

async fn introduce(endpoint: &str, hello: &Hello) -> io::Result<std::net::TcpStream> {
    let mut stream = connect_rank(endpoint).await?;
    stream.write_all(&hello.encode()).await?;
    let mut answer = [0; 4];
    timeout(HELLO_DEADLINE, stream.read_exact(&mut answer)).await??;
    if answer != ACCEPTED {
        return Err(io::Error::other("it does not know this gang or epoch"));
    }
    blocking(stream)
}

async fn accept(
    listener: &TcpListener,
    expected: Hello,
    members: &[Member],
    until: Instant,
) -> Result<Vec<Link>, ConnectError> {
    let mut links: Vec<Link> = Vec::new();
    let mut unknown = JoinSet::new();
    while links.len() < members.len() {
        let is_missing = |member: &&Member| links.iter().all(|link| link.ranks != member.ranks);
        let missing = members.iter().find(is_missing).map_or(0..0, |member| member.ranks.clone());
        tokio::select! {
            accepted = listener.accept(), if unknown.len() < MAX_UNKNOWN => {
                unknown.spawn(hear(accepted?.0));
            }
            Some(heard) = unknown.join_next() => {
                let Ok(Some((hello, mut stream))) = heard else { continue };
                let member = members.iter().find(|member| member.ranks.start == usize::from(hello.from));
                let Some(member) = member.filter(|_| hello == Hello { from: hello.from, ..expected }) else {
                    continue;
                };
                // One that connects twice has given the first one up.
                links.retain(|link| link.ranks != member.ranks);
                if timeout(HELLO_DEADLINE, stream.write_all(&ACCEPTED)).await.is_ok_and(|sent| sent.is_ok()) {
                    links.push(Link { ranks: member.ranks.clone(), stream: blocking(stream)? });
                }
            }
            () = tokio::time::sleep_until(until) => return Err(ConnectError::Missing(missing)),
        }
    }
    Ok(links)
}

async fn hear(mut stream: TcpStream) -> Option<(Hello, TcpStream)> {
    let mut hello = [0; HELLO_BYTES];
    timeout(HELLO_DEADLINE, stream.read_exact(&mut hello)).await.ok()?.ok()?;
    Some((Hello::decode(&hello)?, stream))
}

/// From here on threads read and write it.
fn blocking(stream: TcpStream) -> io::Result<std::net::TcpStream> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn listeners(count: usize) -> (Vec<TcpListener>, Vec<Member>) {
        let mut listeners = Vec::new();
        let mut members = Vec::new();
        for rank in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let endpoint = listener.local_addr().unwrap().to_string();
            members.push(Member { ranks: 2 * rank..2 * rank + 2, endpoint });
            listeners.push(listener);
        }
        (listeners, members)
    }

    #[test]
    fn a_hello_that_changed_is_none() {
        let hello = Hello { epoch: 9, from: 2, to: 0, gang: gang_hash("g") };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        for bit in 0..HELLO_BYTES * 8 {
            let mut bytes = hello.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Hello::decode(&bytes), None, "bit {bit}");
        }
    }

    #[tokio::test]
    async fn everyone_is_connected_to_everyone() {
        let (listeners, members) = listeners(3).await;
        let all = listeners
            .iter()
            .zip(&members)
            .map(|(listener, member)| connect_all(listener, "g", 7, &member.ranks, &members));
        let all = futures::future::try_join_all(all).await.unwrap();
        for (member, links) in members.iter().zip(&all) {
            let peers: Vec<_> = links.iter().map(|link| link.ranks.clone()).collect();
            let others =
                members.iter().map(|member| member.ranks.clone()).filter(|ranks| *ranks != member.ranks);
            assert_eq!(peers, others.collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn strangers_and_those_of_another_epoch_are_not_taken() {
        let (listeners, members) = listeners(2).await;
        let endpoint = &members[0].endpoint;
        let ours = Hello { epoch: 7, from: 2, to: 0, gang: gang_hash("g") };
        let strangers = async {
            for stranger in [
                Hello { epoch: 6, ..ours },
                Hello { gang: gang_hash("other"), ..ours },
                Hello { to: 2, ..ours },
                Hello { from: 4, ..ours },
            ] {
                assert!(introduce(endpoint, &stranger).await.is_err(), "{stranger:?}");
            }
            // Says nothing, and keeps nobody from connecting.
            let _silent = TcpStream::connect(endpoint).await.unwrap();
            introduce(endpoint, &ours).await.unwrap()
        };
        let taken = connect_all(&listeners[0], "g", 7, &members[0].ranks, &members);
        let (taken, _stream) = tokio::join!(taken, strangers);
        assert_eq!(taken.unwrap().len(), 1);
    }
}
