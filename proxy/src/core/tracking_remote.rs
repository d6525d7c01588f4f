//! CLIENT TRACKING … REDIRECT: notices for another client, perhaps one of another worker.
//!
//! Invariant: notices for one client of another worker leave one batch after the other, none before
//! the one ahead of it was taken; what they name is bounded, and past that everything is named.

use std::collections::BTreeMap;

use slotmesh_resp::{Protocol, ReplyScanner, Scan, Value, parse_i64, write};

use super::Core;
use super::call::{Call, PeerRequest, Ticket};
use super::dispatch::Flow;
use super::job::{Answers, Job, Round, Step};
use super::tracking_options::{Asked, read};
use super::tracking_table::ClientNo;

/// The number of no job: answers to calls of this kind come here.
pub(super) const REDIRECTED: u32 = u32::MAX;
/// Notices that wait for one client; past it, it is told to forget everything.
const WAITING_BYTES_MAX: usize = 1024 * 1024;
/// Clients come from another process one batch after the other, and who is told behind who tells: a
/// client that is not here may come within this.
const ARRIVAL_LIMIT_US: u64 = 5_000_000;
/// Between looks whether it has come.
const ARRIVAL_LOOK_US: u64 = 20_000;
/// Names no key but all.
const NULL: &[u8] = b"$-1\r\n";
const CHANNEL: &[u8] = b"__redis__:invalidate";

const TARGET: &[u8] = b"tracking-target";
const BEGIN: &[u8] = b"tracking-begin";
const TELL: &[u8] = b"tracking-tell";
const LIMIT: &[u8] = b"tracking-limit";

#[derive(Debug, Default)]
struct Batch {
    waiting: Vec<u8>,
    /// On its way.
    sent: Vec<u8>,
    number: u32,
    /// Since when its client was not found, and when to look again.
    missing_us: Option<(u64, u64)>,
}

/// What a worker has for clients by their ids.
#[derive(Debug, Default)]
pub(super) struct Remote {
    /// Own clients that were found by their id.
    local: BTreeMap<u64, ClientNo>,
    batches: BTreeMap<u64, Batch>,
    made: u32,
}

impl Core {
    /// The client with this id, if this worker has it.
    fn client_by_id(&mut self, id: u64) -> Option<ClientNo> {
        if let Some(&(slot, generation)) = self.trackers.remote.local.get(&id) {
            let same = self.sessions.get_same(slot, generation);
            if same.is_some_and(|client| client.state.id == id && !client.is_awaited()) {
                return Some((slot, generation));
            }
            self.trackers.remote.local.remove(&id);
        }
        let (slot, client) = self
            .sessions
            .numbered()
            .find(|(_, client)| client.state.id == id && !client.is_awaited())?;
        let no = (slot, client.generation);
        self.trackers.remote.local.insert(id, no);
        Some(no)
    }

    /// A notice for the client with the id `target`.
    pub(super) fn tell_another(&mut self, target: u64, keys: &[u8]) {
        let asked = self.trackers.remote.batches.contains_key(&target);
        if !asked && let Some(no) = self.client_by_id(target) {
            return self.tell_target(no, keys);
        }
        let batch = self.trackers.remote.batches.entry(target).or_default();
        if batch.waiting.len() + keys.len() > WAITING_BYTES_MAX {
            batch.waiting = NULL.to_vec();
        } else {
            batch.waiting.extend_from_slice(keys);
        }
    }

    /// One notice, in the form that the client understands, if any.
    fn tell_target(&mut self, (slot, generation): ClientNo, keys: &[u8]) {
        let Some(client) = self.sessions.get_same(slot, generation) else {
            return;
        };
        let protocol = client.state.protocol;
        let mut out = match protocol {
            Protocol::Resp3 => b">2\r\n$10\r\ninvalidate\r\n".to_vec(),
            Protocol::Resp2 if client.is_subscriber() => {
                let mut out = b"*3\r\n$7\r\nmessage\r\n".to_vec();
                write::write_bulk(&mut out, CHANNEL);
                out
            }
            Protocol::Resp2 => return,
        };
        if keys.first() == Some(&b'*') {
            out.extend_from_slice(keys);
        } else {
            write::write_null(&mut out, protocol);
        }
        self.sessions.push(slot, generation, &out);
    }

    /// Sends what waits for clients of other workers.
    pub(super) fn send_redirected(&mut self) {
        let now_us = self.now_us;
        let Remote { batches, made, .. } = &mut self.trackers.remote;
        let due = |batch: &Batch| batch.missing_us.is_none_or(|(_, at_us)| at_us <= now_us);
        for (id, batch) in batches
            .iter_mut()
            .filter(|(_, batch)| batch.sent.is_empty() && due(batch))
        {
            *made = made.wrapping_add(1);
            batch.number = *made;
            batch.sent = std::mem::take(&mut batch.waiting);
            let request = PeerRequest {
                client_id: *id,
                words: vec![TELL.to_vec(), batch.sent.clone()],
            };
            let ticket = Ticket {
                job: REDIRECTED,
                index: batch.number,
            };
            self.out.calls.push((ticket, Call::Peers(request)));
        }
    }

    /// When to look again for a client that is not here yet.
    pub(super) fn redirects_due(&self) -> Option<u64> {
        let batches = self.trackers.remote.batches.values();
        let missing = batches.filter(|batch| batch.sent.is_empty());
        missing
            .filter_map(|b| b.missing_us.map(|(_, at_us)| at_us))
            .min()
    }

    /// So many redirections less and more.
    pub(super) fn count_redirects(&self, [before, now]: [Option<u64>; 2]) {
        if before == now {
            return;
        }
        if let Some(target) = before.filter(|target| *target != 0) {
            self.pubsub.audience.redirect_ended(target);
        }
        if let Some(target) = now.filter(|target| *target != 0) {
            self.pubsub.audience.redirect_began(target);
        }
    }

    /// The answer of all workers to a batch.
    pub(super) fn redirect_answered(&mut self, number: u32, answer: &[u8]) {
        if number == 0 {
            return; // nobody waits for it
        }
        let (now_us, expects) = (self.now_us, self.pubsub.audience.expects_clients());
        let batches = &mut self.trackers.remote.batches;
        let Some((&id, batch)) = batches.iter_mut().find(|(_, batch)| batch.number == number)
        else {
            return;
        };
        let answers = Value::decode(answer).ok().flatten().map(|(value, _)| value);
        let items = answers.as_ref().and_then(Value::as_items);
        let taken = items.is_some_and(|items| items.iter().any(|item| item.as_int() == Some(1)));
        let unsure = items.is_none_or(|items| items.iter().any(|item| item.as_int().is_none()));
        if !taken && unsure {
            // Someone was too busy: again, and everything, which is never wrong.
            batch.sent.clear();
            batch.waiting = NULL.to_vec();
            self.out.unsteady = true;
            return;
        }
        batch.sent.clear();
        let since_us = batch.missing_us.map_or(now_us, |(since_us, _)| since_us);
        let may_come = expects && since_us + ARRIVAL_LIMIT_US > now_us;
        if !taken && may_come {
            batch.missing_us = Some((since_us, now_us + ARRIVAL_LOOK_US));
            batch.waiting = NULL.to_vec();
            self.out.unsteady = true;
            return;
        }
        batch.missing_us = None;
        if !taken {
            batches.remove(&id);
            self.redirect_broken(id);
        } else if batch.waiting.is_empty() {
            batches.remove(&id);
        }
    }

    /// The client that was to be told is gone: those who wanted it hear so.
    fn redirect_broken(&mut self, id: u64) {
        let mut push = b">2\r\n$21\r\ntracking-redir-broken\r\n".to_vec();
        write::write_int(&mut push, id as i64);
        let mut told = Vec::new();
        for (slot, client) in self.sessions.numbered_mut() {
            let generation = client.generation;
            let protocol = client.state.protocol;
            let own = client
                .extra
                .as_mut()
                .and_then(|extra| extra.tracking.as_mut());
            if let Some(own) = own.filter(|own| own.options.redirect == id) {
                own.broken = true;
                if protocol == Protocol::Resp3 {
                    told.push((slot, generation));
                }
            }
        }
        for (slot, generation) in told {
            self.sessions.push(slot, generation, &push);
        }
    }

    /// CLIENT TRACKING ON with a REDIRECT to a client that this worker does not have.
    pub(super) fn track_for_another(&mut self, slot: u32, words: &[&[u8]]) -> Flow {
        let at = words
            .iter()
            .position(|word| word.eq_ignore_ascii_case(b"redirect"));
        let id = at.and_then(|at| parse_i64(words.get(at + 1)?)).unwrap_or(0);
        let job = FindTarget {
            client_id: self.sessions.get(slot).map_or(0, |client| client.state.id),
            target: id.max(0) as u64,
            words: words.iter().map(|word| word.to_vec()).collect(),
            found: false,
        };
        self.start_job(slot, Box::new(job))
    }

    /// Someone sets parameters: the engine's limit of remembered keys is that of all workers too. It
    /// is no harm to tell clients early of what is too much, even if the change is then refused.
    pub(super) fn note_tracking_limit(&mut self, pairs: &[Vec<u8>]) {
        for pair in pairs.chunks_exact(2) {
            if pair[0].eq_ignore_ascii_case(b"tracking-table-max-keys") {
                let request = PeerRequest {
                    client_id: 0,
                    words: vec![LIMIT.to_vec(), pair[1].clone()],
                };
                let nobody = Ticket {
                    job: REDIRECTED,
                    index: 0,
                };
                self.out.calls.push((nobody, Call::Peers(request)));
            }
        }
    }

    /// Questions of other workers (and of this one) about redirections.
    pub(super) fn peer_tracking(&mut self, request: &PeerRequest) -> Option<Vec<u8>> {
        let name = request.words.first()?.as_slice();
        if name == LIMIT {
            let max = parse_i64(request.words.get(1)?).unwrap_or(0);
            self.set_tracking_keys_max(usize::try_from(max).unwrap_or(0));
            return Some(b":1\r\n".to_vec());
        }
        if ![TARGET, TELL, BEGIN].contains(&name) {
            return None;
        }
        let found = self.client_by_id(request.client_id);
        let mut reply = Vec::new();
        match name {
            TARGET => write::write_int(&mut reply, i64::from(found.is_some())),
            TELL => {
                write::write_int(&mut reply, i64::from(found.is_some()));
                let (mut keys, mut scanner) =
                    (request.words.get(1)?.as_slice(), ReplyScanner::new());
                while let (Some(no), Ok(Scan::Complete { consumed, .. })) =
                    (found, scanner.scan(keys))
                {
                    self.tell_target(no, &keys[..consumed]);
                    keys = &keys[consumed..];
                }
            }
            BEGIN => match found {
                None => write::write_int(&mut reply, 0),
                Some((slot, _)) => self.begin_for_another(slot, &request.words, &mut reply),
            },
            _ => return None,
        }
        Some(reply)
    }

    fn begin_for_another(&mut self, slot: u32, words: &[Vec<u8>], reply: &mut Vec<u8>) {
        let words: Vec<&[u8]> = words.iter().skip(1).map(Vec::as_slice).collect();
        let extra = self
            .sessions
            .get(slot)
            .and_then(|client| client.extra.as_ref());
        let own = extra.and_then(|extra| extra.tracking.as_ref());
        match read(&words, own.map(|own| &own.options), |_| true) {
            Ok(Asked::On(options)) => {
                self.set_tracking(slot, options, None);
                write::write_simple(reply, "OK");
            }
            Ok(Asked::Off) => write::write_int(reply, 0),
            Err(text) => write::write_error(reply, text),
        }
    }
}

/// Looks for the client that is to be told, and begins if there is one.
#[derive(Debug)]
struct FindTarget {
    client_id: u64,
    target: u64,
    words: Vec<Vec<u8>>,
    found: bool,
}

impl Job for FindTarget {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        let Some(answer) = answers.first() else {
            round.call(Call::Peers(PeerRequest {
                client_id: self.target,
                words: vec![TARGET.to_vec()],
            }));
            return Step::Asked;
        };
        let value = Value::decode(answer).ok().flatten().map(|(value, _)| value);
        let items = value.as_ref().and_then(Value::as_items).unwrap_or_default();
        if self.found {
            let error = items.iter().find_map(Value::as_error);
            return match error {
                Some(error) => round.fail(error.as_bytes()),
                None => round.done(|out, _| write::write_simple(out, "OK")),
            };
        }
        if !items.iter().any(|item| item.as_int() == Some(1)) {
            return round.fail(b"ERR The client ID you want redirect to does not exist");
        }
        self.found = true;
        let mut words = vec![BEGIN.to_vec()];
        words.append(&mut self.words);
        round.call(Call::Peers(PeerRequest {
            client_id: self.client_id,
            words,
        }));
        Step::Asked
    }
}
