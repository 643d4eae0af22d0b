//! The connections between the processes of a gang, for one epoch: what their ranks give each other in a step.
//!
//! Every process has a connection to every other one. A thread a connection reads, so that no process waits for another one
//! to read what it writes. Any damage, and any connection that ends, ends the mesh, and with it the epoch.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use herd_engine::{CollectiveError, Columns, GIVEN_AHEAD, Remote};

use super::frame::{HEADER_BYTES, Header, Kind, payload, values};
use crate::metrics::Metrics;

/// Frames that were read and not taken yet. Processes of a stage are one operation apart at most: a process that is ahead has
/// given to the next operation, and a follower its columns before that. A stage gives the next one all of a step at most.
const FRAMES_AHEAD: usize = 4 + GIVEN_AHEAD;

/// For the kernel to take what is written. The other process reads at all times.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// How far processes may be apart before the slower one is given up. One that is stopped is missed much sooner, by its
/// reports: this is for one that is alive and stuck.
const SKEW_DEADLINE: Duration = Duration::from_mins(2);

/// A connection to another process of the gang.
#[derive(Debug)]
pub(super) struct Link {
    /// Those of the other process.
    pub(super) ranks: Range<usize>,
    pub(super) stream: TcpStream,
}

/// All connections of one process.
pub(super) struct Mesh {
    own: Range<usize>,
    epoch: u64,
    peers: Vec<Peer>,
    end: Arc<End>,
    metrics: Arc<Metrics>,
}

struct Peer {
    ranks: Range<usize>,
    outgoing: Mutex<Outgoing>,
    /// None while it is being dropped.
    incoming: Mutex<Option<Receiver<Frame>>>,
    reader: Option<JoinHandle<()>>,
}

struct Outgoing {
    stream: TcpStream,
    sequence: u64,
}

struct Frame {
    kind: Kind,
    ranks: Vec<Vec<f32>>,
}

/// The end of the mesh, as soon as there is a reason.
#[derive(Debug)]
struct End {
    reason: OnceLock<CollectiveError>,
    streams: Vec<TcpStream>,
}

impl End {
    fn because(&self, rank: usize, reason: impl Into<String>) -> CollectiveError {
        let error = self.reason.get_or_init(|| CollectiveError::Aborted { rank, reason: reason.into() });
        for stream in &self.streams {
            // One that is closed already is what is wanted.
            let _ = stream.shutdown(Shutdown::Both);
        }
        error.clone()
    }
}

impl Mesh {
    /// Takes over connections that are made; `max_values` is the most that a rank ever gives at once.
    pub(super) fn start(
        own: Range<usize>,
        epoch: u64,
        max_values: usize,
        links: Vec<Link>,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Arc<Self>> {
        let streams = links.iter().map(|link| link.stream.try_clone()).collect::<Result<_, _>>()?;
        let end = Arc::new(End { reason: OnceLock::new(), streams });
        let peers = links
            .into_iter()
            .map(|link| Peer::start(link, epoch, max_values, &end, metrics))
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(Self { own, epoch, peers, end, metrics: Arc::clone(metrics) }))
    }

    /// Ends it: what is under way fails here, and in every other process once it sees its connection closed.
    pub(super) fn end(&self, reason: &str) {
        self.end.because(self.own.start, reason);
    }

    /// Tells the leader that a step is done here.
    pub(super) fn give_columns(&self, columns: &[Columns]) -> Result<(), CollectiveError> {
        let own: Vec<&[f32]> = columns.iter().map(|columns| columns.logits.as_slice()).collect();
        // A step that wants no logits gives none, and is told all the same.
        let own = if own.is_empty() { vec![&[][..]; self.own.len()] } else { own };
        let leader = self.peers.iter().filter(|peer| peer.ranks.contains(&0));
        self.send(leader, Kind::Columns, &own)
    }

    /// Waits until a step is done in all other processes; what their ranks computed.
    pub(super) fn take_columns(&self) -> Result<Vec<Columns>, CollectiveError> {
        let mut columns = Vec::new();
        for peer in &self.peers {
            let given = self.receive(peer, Kind::Columns)?;
            columns.extend(peer.ranks.clone().zip(given).map(|(rank, logits)| Columns { rank, logits }));
        }
        Ok(columns)
    }

    fn send<'a>(
        &self,
        peers: impl Iterator<Item = &'a Peer>,
        kind: Kind,
        own: &[&[f32]],
    ) -> Result<(), CollectiveError> {
        let width = own.first().map_or(0, |values| values.len());
        if let Some((rank, other)) = self.own.clone().zip(own).find(|(_, values)| values.len() != width) {
            self.end("its ranks give unlike numbers of values");
            return Err(CollectiveError::Mismatch { rank, given: other.len(), own: width });
        }
        let payload = payload(own);
        let payload_crc = crc32fast::hash(&payload);
        for peer in peers {
            let mut outgoing = peer.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
            let header = Header {
                kind,
                epoch: self.epoch,
                sequence: outgoing.sequence,
                first_rank: self.own.start as u16,
                ranks: own.len() as u16,
                values: width as u32,
                payload_crc,
            };
            outgoing.sequence += 1;
            let Outgoing { stream, .. } = &mut *outgoing;
            let written = stream.write_all(&header.encode()).and_then(|()| stream.write_all(&payload));
            written.map_err(|error| {
                self.end.because(peer.ranks.start, format!("cannot write to it: {error}"))
            })?;
            self.metrics.rank_sent(HEADER_BYTES + payload.len());
        }
        Ok(())
    }

    fn peer(&self, rank: usize) -> Result<&Peer, CollectiveError> {
        let peer = self.peers.iter().find(|peer| peer.ranks.contains(&rank));
        peer.ok_or_else(|| self.end.because(self.own.start, format!("there is no process with rank {rank}")))
    }

    fn receive(&self, peer: &Peer, kind: Kind) -> Result<Vec<Vec<f32>>, CollectiveError> {
        let because = |reason: &str| self.end.because(peer.ranks.start, reason);
        let incoming = peer.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let incoming = incoming.as_ref().ok_or_else(|| because("it is being dropped"))?;
        match incoming.recv_timeout(SKEW_DEADLINE) {
            Ok(Frame { kind: given, ranks }) if given == kind => Ok(ranks),
            Ok(Frame { kind: given, .. }) => Err(because(&format!("gave {given:?} instead of {kind:?}"))),
            Err(RecvTimeoutError::Timeout) => Err(because("is alive and gives nothing")),
            // The reader has said why.
            Err(RecvTimeoutError::Disconnected) => Err(because("its connection ended")),
        }
    }
}

impl Remote for Mesh {
    fn exchange(
        &self,
        stage: &Range<usize>,
        own: &[&[f32]],
        take: &mut dyn FnMut(usize, Vec<f32>),
    ) -> Result<(), CollectiveError> {
        let peers = || self.peers.iter().filter(|peer| stage.contains(&peer.ranks.start));
        self.send(peers(), Kind::Exchange, own)?;
        for peer in peers() {
            let given = self.receive(peer, Kind::Exchange)?;
            peer.ranks.clone().zip(given).for_each(|(rank, values)| take(rank, values));
        }
        Ok(())
    }

    fn give(&self, rank: usize, values: &[f32]) -> Result<(), CollectiveError> {
        self.send(std::iter::once(self.peer(rank)?), Kind::Hidden, &[values])
    }

    fn take(&self, rank: usize) -> Result<Vec<f32>, CollectiveError> {
        Ok(self.receive(self.peer(rank)?, Kind::Hidden)?.pop().unwrap_or_default())
    }

    fn abort(&self, reason: &str) {
        self.end(reason);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.end("it was dropped");
        for peer in &mut self.peers {
            // A reader that waits for room ends as well.
            *peer.incoming.lock().unwrap_or_else(PoisonError::into_inner) = None;
            if let Some(reader) = peer.reader.take() {
                let _ = reader.join();
            }
        }
    }
}

impl Peer {
    fn start(
        link: Link,
        epoch: u64,
        max_values: usize,
        end: &Arc<End>,
        metrics: &Arc<Metrics>,
    ) -> io::Result<Self> {
        let Link { ranks, stream } = link;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_DEADLINE))?;
        let (frames, incoming) = sync_channel(FRAMES_AHEAD);
        let mut reader = Reader {
            ranks: ranks.clone(),
            epoch,
            max_values,
            stream: stream.try_clone()?,
            frames,
            metrics: Arc::clone(metrics),
        };
        let (end, number) = (Arc::clone(end), ranks.start);
        let reader = thread::Builder::new().name(format!("from rank {number}")).spawn(move || {
            let reason = reader.run();
            if end.reason.get().is_none() {
                reader.metrics.rank_connection_broke();
            }
            // Before those that wait are told that there is no more.
            end.because(number, reason);
            drop(reader);
        })?;
        Ok(Self {
            ranks,
            outgoing: Mutex::new(Outgoing { stream, sequence: 0 }),
            incoming: Mutex::new(Some(incoming)),
            reader: Some(reader),
        })
    }
}

/// Reads frames of one process.
struct Reader {
    ranks: Range<usize>,
    epoch: u64,
    max_values: usize,
    stream: TcpStream,
    frames: SyncSender<Frame>,
    metrics: Arc<Metrics>,
}

impl Reader {
    /// To the end of the connection; why it ended.
    fn run(&mut self) -> String {
        let mut sequence = 0;
        loop {
            match self.frame(sequence) {
                Ok(frame) => {
                    if self.frames.send(frame).is_err() {
                        return "nobody takes its frames".to_owned();
                    }
                }
                Err(reason) => return reason,
            }
            sequence += 1;
        }
    }

    fn frame(&mut self, expected: u64) -> Result<Frame, String> {
        let lost = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "its connection was closed".to_owned(),
            _ => format!("its connection broke: {error}"),
        };
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header).map_err(lost)?;
        let header = Header::decode(&header).map_err(|error| error.to_string())?;
        let Header { kind, epoch, sequence, first_rank, ranks, values: count, payload_crc: _ } = header;
        if epoch != self.epoch || sequence != expected {
            return Err(format!("sent frame {sequence} of epoch {epoch}, not {expected} of {}", self.epoch));
        }
        let all = if kind == Kind::Hidden { 1 } else { self.ranks.len() };
        if usize::from(first_rank) != self.ranks.start || usize::from(ranks) != all {
            return Err(format!("speaks for {ranks} ranks from {first_rank} on, not for {:?}", self.ranks));
        }
        if count as usize > self.max_values {
            return Err(format!("gives {count} values a rank, {} at most", self.max_values));
        }
        let mut payload = vec![0; header.payload_bytes()];
        self.stream.read_exact(&mut payload).map_err(lost)?;
        let ranks = values(&header, &payload).map_err(|error| error.to_string())?;
        self.metrics.rank_received(HEADER_BYTES + payload.len());
        Ok(Frame { kind, ranks })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::TcpListener;

    use herd_engine::{Collective as _, LocalRank};
    use herd_model::Parallelism;

    use super::*;
    use crate::metrics::MetricOptions;

    /// Both ends of a connection.
    pub(in crate::ranks) fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn metrics() -> Arc<Metrics> {
        Arc::new(Metrics::new(MetricOptions::default()).unwrap())
    }

    /// The processes of a gang with these numbers of ranks.
    fn meshes(sizes: &[usize]) -> Vec<Arc<Mesh>> {
        let ranges: Vec<Range<usize>> = sizes
            .iter()
            .scan(0, |from, size| {
                *from += size;
                Some(*from - size..*from)
            })
            .collect();
        let mut links: Vec<Vec<Link>> = sizes.iter().map(|_| Vec::new()).collect();
        for high in 1..sizes.len() {
            for low in 0..high {
                let (one, other) = pair();
                links[high].push(Link { ranks: ranges[low].clone(), stream: one });
                links[low].push(Link { ranks: ranges[high].clone(), stream: other });
            }
        }
        let starts = ranges.into_iter().zip(links);
        starts.map(|(own, links)| Mesh::start(own, 5, 1000, links, &metrics()).unwrap()).collect()
    }

    /// Runs `each` on every rank, a thread each.
    fn on_each<T: Send>(ranks: Vec<LocalRank>, each: impl Fn(LocalRank) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let each = &each;
            let ranks: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || each(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// The ranks of all processes.
    fn ranks(meshes: &[Arc<Mesh>], parallelism: Parallelism) -> Vec<LocalRank> {
        let part = |mesh: &Arc<Mesh>| {
            let remote: Arc<dyn Remote> = Arc::<Mesh>::clone(mesh);
            LocalRank::part(mesh.own.clone(), parallelism, Some(remote))
        };
        meshes.iter().flat_map(part).collect()
    }

    #[test]
    fn ranks_of_several_processes_get_what_threads_get() {
        // Sums of these depend on their order.
        let given = |rank: usize, turn: usize| [1e8, -1e8, 1.0, 0.1][rank] * (turn + 1) as f32;
        let run = |parallelism: Parallelism, rank: &LocalRank| {
            let stage = rank.rank() / parallelism.tensor;
            let turns = 0..50;
            turns
                .map(|turn| {
                    let width = 1 + 7 * (turn % 3);
                    let mut sum =
                        if stage == 0 { vec![0.0; width] } else { rank.take_previous().unwrap().to_vec() };
                    assert_eq!(sum.len(), width);
                    sum[0] += given(rank.rank(), turn);
                    let mut maximum = sum.clone();
                    rank.all_reduce_sum(&mut sum).unwrap();
                    rank.all_reduce_max(&mut maximum).unwrap();
                    if stage + 1 < parallelism.pipeline {
                        rank.give_next(&sum).unwrap();
                    }
                    (sum[0].to_bits(), maximum[0].to_bits())
                })
                .collect::<Vec<_>>()
        };
        for (tensor, pipeline, sizes) in [
            (4, 1, &[1, 3][..]),
            (4, 1, &[2, 2]),
            (4, 1, &[1, 1, 1, 1]),
            (4, 1, &[1, 2, 1]),
            (2, 2, &[2, 2]),
            (2, 2, &[1, 1, 1, 1]),
            (1, 4, &[1, 1, 1, 1]),
        ] {
            let parallelism = Parallelism { tensor, pipeline };
            let threads = on_each(LocalRank::gang(parallelism), |rank| run(parallelism, &rank));
            let several = on_each(ranks(&meshes(sizes), parallelism), |rank| run(parallelism, &rank));
            assert_eq!(several, threads, "{parallelism:?} {sizes:?}");
        }
    }

    #[test]
    fn a_process_that_ends_ends_all() {
        let meshes = meshes(&[1, 1, 1]);
        let results = on_each(ranks(&meshes, Parallelism::tensor(3)), |rank| {
            if rank.rank() == 2 {
                rank.abort("out of memory");
            }
            rank.all_reduce_sum(&mut [1.0])
        });
        assert!(results.iter().all(Result::is_err), "{results:?}");
        // Also what is asked later.
        assert!(meshes[0].take_columns().is_err());
    }

    #[test]
    fn columns_come_when_a_step_is_done_also_if_there_are_none() {
        let meshes = meshes(&[1, 2]);
        let columns =
            [(1, vec![1.0, 2.0]), (2, vec![3.0, 4.0])].map(|(rank, logits)| Columns { rank, logits });
        meshes[1].give_columns(&columns).unwrap();
        assert_eq!(meshes[0].take_columns().unwrap(), columns);
        meshes[1].give_columns(&[]).unwrap();
        assert!(meshes[0].take_columns().unwrap().iter().all(|columns| columns.logits.is_empty()));
    }

    #[test]
    fn a_connection_that_breaks_is_counted_and_one_that_is_ended_here_is_not() {
        let broken = |end_here: bool| {
            let (near, far) = pair();
            let metrics = metrics();
            let mesh = Mesh::start(0..1, 5, 10, vec![Link { ranks: 1..2, stream: near }], &metrics).unwrap();
            if end_here {
                mesh.end("done");
            } else {
                far.shutdown(Shutdown::Both).unwrap();
            }
            mesh.take_columns().unwrap_err();
            drop(mesh);
            metrics.render(None, 0).unwrap().contains("herd_rank_connections_broken_total 1")
        };
        assert!(broken(false));
        assert!(!broken(true));
    }

    /// What the leader's mesh makes of bytes.
    fn reason(bytes: impl FnOnce(&mut TcpStream)) -> String {
        let (near, mut far) = pair();
        let mesh = Mesh::start(0..1, 5, 10, vec![Link { ranks: 1..2, stream: near }], &metrics()).unwrap();
        bytes(&mut far);
        mesh.take_columns().unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_frame_of_this_epoch_ends_it() {
        let given = payload(&[&[1.0]]);
        let header = Header {
            kind: Kind::Columns,
            epoch: 5,
            sequence: 0,
            first_rank: 1,
            ranks: 1,
            values: 1,
            payload_crc: crc32fast::hash(&given),
        };
        let told = |header: Header, payload: &[u8]| {
            reason(|far| {
                far.write_all(&header.encode()).unwrap();
                far.write_all(payload).unwrap();
            })
        };
        let cases = [
            (told(Header { epoch: 6, ..header }, &given), "of epoch 6"),
            (told(Header { sequence: 1, ..header }, &given), "frame 1"),
            (told(Header { first_rank: 0, ..header }, &given), "speaks for"),
            (told(Header { values: 11, ..header }, &given), "11 values"),
            (told(Header { kind: Kind::Exchange, ..header }, &given), "Exchange instead of Columns"),
            (told(header, &[0; 4]), "checksum"),
            (reason(|far| far.write_all(&[0; HEADER_BYTES]).unwrap()), "not a frame"),
            (reason(|far| far.shutdown(Shutdown::Both).unwrap()), "closed"),
        ];
        for (told, part) in cases {
            assert!(told.contains(part) && told.contains("rank 1"), "{told} has no {part:?}");
        }
    }
}
