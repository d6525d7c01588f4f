//! Clients that listen to channels, or monitor nodes: announced first, so that the other process listens
//! for them too, then cut from one process to the other by a marker.
//!
//! Invariant: whatever was announced is ended at both sides: the client came, or its place is given up.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use slotmesh_proto::handover::v1 as pb;
use slotmesh_proto::handover::v1::to_giver::Message as Answer;
use slotmesh_proto::handover::v1::to_taker::Message as Said;
use slotmesh_resp::Protocol;

use super::Office;
use super::giver::{BATCH_BYTES, Giver, say};
use super::wire::WireError;
use crate::core::passing_looks::LooseSource;
use crate::core::passing_topics::{Listening, Wanted};
use crate::worker::{Accepted, Cutting, Pass, Reserve};

/// Clients per announcement: each may have two connections to nodes, and a message has room for 250
/// descriptors.
const ANNOUNCED_MAX: usize = 80;
/// For the other process to have everything confirmed by nodes; its own limit is shorter.
const READY_LIMIT: Duration = Duration::from_secs(4);
/// Between tries for those who could not be cut: as for others (`worker::passing`).
const TRY_AGAIN: Duration = Duration::from_millis(300);

impl Giver<'_> {
    /// One round of each worker. Returns how many went.
    pub(super) fn give_listening(&mut self) -> Result<usize, WireError> {
        if self.schema_max < 4 || self.listening_at > Instant::now() {
            return Ok(0);
        }
        let (mut given, mut tried) = (0, 0);
        for worker in 0..self.office.workers.len() {
            let (gave, found) = self.give_listening_of(worker)?;
            (given, tried) = (given + gave, tried + found);
        }
        // Those who could not be cut are passed over for a while, so that others have their turn.
        if tried == 0 {
            self.listening_at = Instant::now() + TRY_AGAIN;
        }
        Ok(given)
    }

    /// How many went, of how many that were tried.
    fn give_listening_of(&mut self, worker: usize) -> Result<(usize, usize), WireError> {
        let (answer, answered) = sync_channel(1);
        let wanted = Wanted {
            clients_max: ANNOUNCED_MAX,
            bytes_max: BATCH_BYTES,
            schema_max: self.schema_max,
        };
        self.office.pass(worker, Pass::Listening(wanted, answer));
        let clients = answered.recv().unwrap_or_default();
        let tried = clients.len();
        if tried == 0 {
            return Ok((0, 0));
        }
        let marker = self.office.new_marker();
        let announce = pb::Announce {
            marker: marker.clone(),
            clients: clients.iter().map(|(_, one)| told(one.clone())).collect(),
        };
        say(self.wire, Said::Announce(announce), &[])?;
        let (ready, _) = self.wire.receive::<pb::ToGiver>(READY_LIMIT)?;
        match ready.message {
            Some(Answer::Ready(ready)) if ready.ready => {}
            Some(Answer::Ready(_)) => {
                let keys = clients.into_iter().map(|(key, _)| key).collect();
                self.office.pass(worker, Pass::PutOff(keys));
                return Ok((0, tried));
            }
            _ => return Err(WireError::Nonsense("neither ready nor not")),
        }
        let (answer, answered) = sync_channel(1);
        let cutting = Cutting {
            marker: marker.clone(),
            clients,
            schema_max: self.schema_max,
            answer,
        };
        self.office.pass(worker, Pass::Cut(cutting));
        // Without a limit, as in `collect`.
        let mut parcels = answered.recv().map(|c| c.parcels).unwrap_or_default();
        let mut bytes = 0;
        let fits = parcels.iter().take_while(|parcel| {
            let before = bytes;
            bytes += parcel.bytes_len();
            before < BATCH_BYTES
        });
        let rest = parcels.split_off(fits.count());
        self.return_all(rest);
        let given = self.give_batch(parcels, true);
        self.office.pass(worker, Pass::EndCut(marker, Vec::new()));
        Ok((given?, tried))
    }
}

fn told(listening: Listening) -> pb::Listening {
    let [channels, patterns, shard_channels] = listening.names;
    pb::Listening {
        id: listening.id,
        resp3: listening.protocol == Protocol::Resp3,
        channels,
        patterns,
        shard_channels,
        sources: listening
            .sources
            .iter()
            .map(LooseSource::to_message)
            .collect(),
    }
}

fn heard(listening: pb::Listening) -> Listening {
    Listening {
        id: listening.id,
        protocol: if listening.resp3 {
            Protocol::Resp3
        } else {
            Protocol::Resp2
        },
        names: [
            listening.channels,
            listening.patterns,
            listening.shard_channels,
        ],
        sources: listening
            .sources
            .into_iter()
            .filter_map(LooseSource::read)
            .collect(),
    }
}

/// Clients that are to come to a worker.
#[derive(Debug, Default)]
pub(super) struct Announced {
    worker: usize,
    marker: Vec<u8>,
    /// Ids, with slots and generations.
    places: HashMap<u64, (u32, u32)>,
}

impl Announced {
    /// Listens for clients. `None`: it could not be confirmed in time.
    pub(super) fn prepare(office: &Office, announce: pb::Announce) -> Option<Self> {
        let workers = office.workers.iter().enumerate();
        let (worker, _) = workers.min_by_key(|(_, worker)| worker.load())?;
        let ids: Vec<u64> = announce.clients.iter().map(|client| client.id).collect();
        let (answer, answered) = sync_channel(1);
        let reserve = Reserve {
            marker: announce.marker.clone(),
            clients: announce.clients.into_iter().map(heard).collect(),
            answer,
        };
        office.pass(worker, Pass::Reserve(reserve));
        let places = answered.recv().ok()??;
        Some(Self {
            worker,
            marker: announce.marker,
            places: ids.into_iter().zip(places).collect(),
        })
    }

    /// The place of a client, if it was announced.
    pub(super) fn take(&mut self, id: u64) -> Option<(u32, u32)> {
        self.places.remove(&id)
    }

    /// These were taken and do not come after all.
    pub(super) fn put_back(&mut self, places: impl Iterator<Item = (u64, (u32, u32))>) {
        self.places.extend(places);
    }

    /// Gives a client that was announced to its worker, which is to be woken for it.
    pub(super) fn place(&self, office: &Office, client: Accepted) {
        let mut next = Some(client);
        while let Some(client) = next {
            next = office.workers[self.worker].put(client);
            if next.is_some() && office.stop.is_cancelled() {
                office.clients.fetch_sub(1, Ordering::Relaxed);
                return; // as with any other client
            }
            if next.is_some() {
                office.workers[self.worker].wake();
                std::thread::yield_now(); // there is room once it has turned
            }
        }
    }

    /// Those who have not come by now do not come.
    pub(super) fn end(self, office: &Office) {
        let unwanted = self.places.into_values().collect();
        office.pass(self.worker, Pass::EndCut(self.marker, unwanted));
    }
}
