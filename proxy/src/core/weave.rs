//! EXEC of a transaction that is not one plain block: with a WATCH, over several shards, with SELECT,
//! or with commands that the proxy answers.
//!
//! Invariants: each shard gets one block, atomic there; blocks of different shards are not atomic
//! together. The reply has one element for each queued command, in their order. A block that failed
//! as a whole gives its error to each of its commands; if it is the only one, the whole EXEC is that
//! error (or nil), nothing else was executed, and the client's database is what it was. Commands of
//! the proxy run after the blocks. A block leaves the connection's database as it found it.

use std::collections::VecDeque;

use slotmesh_resp::{Args, Parsed, Protocol, ReplyScanner, RequestParser, Scan, write};

use super::Core;
use super::answer::{OUTCOME_UNKNOWN, TORN, error_line};
use super::client::{Pause, Transaction};
use super::dispatch::Flow;
use super::job::BLOCK_COMMANDS_MAX;
use super::lane::{SILENCE_LIMIT_US, lane_no};
use super::line::{LineEvent, LineNo, Use};
use super::queue::{Entry, Kind};
use super::sessions::NoOutlet;
use super::spec::Request;
use super::transaction::{BlockStep, BlockVerdict, BlockWatch};
use super::weave_blocks::{Block, NOT_HERE, Parts, Place};
use crate::routing::ShardNo;

/// The block that runs where the client's keys are watched.
#[derive(Debug)]
struct Watched {
    line: LineNo,
    shard: ShardNo,
    frame: Vec<u8>,
    replies: u32,
    read_only: bool,
    watch: BlockWatch,
    until_us: u64,
    /// The reply, while the node is asked whether enough replicas have what was done.
    confirming: Option<Vec<u8>>,
}

/// One EXEC on its way.
#[derive(Debug)]
struct Weave {
    serial: u32,
    client: u32,
    generation: u32,
    ticket: (u32, u32),
    protocol: Protocol,
    places: Vec<Place>,
    /// Each block's reply.
    replies: Vec<Vec<u8>>,
    missing: usize,
    local: VecDeque<Vec<u8>>,
    /// The client's database after it, if it is another; the client's next command waits then.
    db: Option<u16>,
    watched: Option<Watched>,
}

impl Watched {
    /// What the loss of its line means. Nothing was executed before EXEC was sent whole, but how far
    /// it was sent is not known.
    fn lost(&self, nil: Vec<u8>) -> Vec<u8> {
        if self.read_only && !self.watch.is_torn() && self.confirming.is_none() {
            nil
        } else {
            error_line(OUTCOME_UNKNOWN)
        }
    }
}

impl Weave {
    /// The only block failed as a whole: its error, or nil, is the answer.
    fn failure(&self) -> Option<&[u8]> {
        match &self.replies[..] {
            [reply] if members(reply).is_none() => Some(reply),
            _ => None,
        }
    }

    /// All replies in the order of the commands.
    fn compose(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let own = |place: &&Place| matches!(place, Place::Own(_));
        let count = self.places.len() - self.places.iter().filter(own).count();
        write::write_array_header(&mut out, count);
        let rests = self
            .replies
            .iter()
            .map(|reply| members(reply).ok_or(&reply[..]));
        let mut rests: Vec<Result<&[u8], &[u8]>> = rests.collect();
        for place in &self.places {
            match place {
                Place::Ready(reply) => out.extend_from_slice(reply),
                Place::Proxy => out.extend_from_slice(&error_line(NOT_HERE)),
                Place::Block(at) => match &mut rests[*at] {
                    Ok(rest) => out.extend_from_slice(next_reply(rest)),
                    Err(error) => out.extend_from_slice(error),
                },
                Place::Own(at) => {
                    if let Ok(rest) = &mut rests[*at] {
                        next_reply(rest);
                    }
                }
            }
        }
        out
    }

    /// Puts the next reply of the proxy in its place.
    fn put(&mut self, reply: &[u8]) {
        let waits = |place: &&mut Place| matches!(place, Place::Proxy);
        if let Some(place) = self.places.iter_mut().find(waits) {
            *place = Place::Ready(reply.to_vec());
        }
    }
}

/// The members of an array.
fn members(reply: &[u8]) -> Option<&[u8]> {
    if reply.first() != Some(&b'*') || reply.starts_with(b"*-1") {
        return None;
    }
    let end = memchr::memchr(b'\n', reply)?;
    Some(&reply[end + 1..])
}

/// Takes the first of several replies. A node that gave fewer than it was asked gives nil.
fn next_reply<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    match ReplyScanner::new().scan(rest) {
        Ok(Scan::Complete { consumed, .. }) => {
            let (reply, more) = rest.split_at(consumed);
            *rest = more;
            reply
        }
        _ => b"$-1\r\n",
    }
}

/// All of a worker.
#[derive(Debug, Default)]
pub(super) struct Weaves {
    all: Vec<Option<Weave>>,
    free: Vec<u32>,
    /// Those whose next command is the proxy's.
    due: Vec<u32>,
    serial: u32,
}

impl Weaves {
    /// True if an EXEC of the client runs.
    pub(super) fn has_one_of(&self, slot: u32) -> bool {
        self.all.iter().flatten().any(|weave| weave.client == slot)
    }

    fn get(&mut self, number: u32) -> Option<&mut Weave> {
        self.all.get_mut(number as usize)?.as_mut()
    }
}

impl Core {
    pub(super) fn exec_woven(
        &mut self,
        slot: u32,
        transaction: &Transaction,
        watching: bool,
    ) -> Flow {
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        let (db, in_flight) = (client.state.db, client.in_flight());
        let home = client.watching().map(|watching| watching.shard);
        let mut parts = self.take_apart(transaction, db, home);
        let waits = watching || parts.db != db || !parts.local.is_empty();
        if waits && in_flight > 0 {
            return Flow::NotYet;
        }
        parts.end(db);
        if parts.blocks.iter().any(|b| b.commands > BLOCK_COMMANDS_MAX) {
            self.release_watch(slot);
            return self.reply_error(slot, b"ERR slotmesh: the transaction is too large");
        }
        if watching {
            return self.exec_watched(slot, parts);
        }
        if !self.blocks_fit(slot, &parts.blocks) {
            return Flow::NoRoom;
        }
        let blocks = std::mem::take(&mut parts.blocks);
        let number = self.begin_weave(slot, parts, blocks.len(), None, waits);
        self.send_blocks(slot, number, db, &blocks);
        if blocks.is_empty() {
            self.go_on(number);
        }
        Flow::Taken
    }

    fn blocks_fit(&mut self, slot: u32, blocks: &[Block]) -> bool {
        let Some(client) = self.sessions.get(slot) else {
            return true;
        };
        for block in blocks {
            let lane = &mut self.lanes[client.lane(block.shard).0 as usize];
            if !lane.has_room(self.table.settings.hold_bytes_max) {
                lane.note_full(self.now_us, &mut self.out);
                return false;
            }
        }
        true
    }

    /// Numbers the client's EXEC. If `waits`, its next command is taken after the reply.
    fn begin_weave(
        &mut self,
        slot: u32,
        parts: Parts,
        blocks: usize,
        watched: Option<Watched>,
        waits: bool,
    ) -> u32 {
        self.weaves.serial = self.weaves.serial.wrapping_add(1);
        let serial = self.weaves.serial;
        let number = self.weaves.free.pop().unwrap_or_else(|| {
            self.weaves.all.push(None);
            (self.weaves.all.len() - 1) as u32
        });
        if let Some(client) = self.sessions.get_mut(slot) {
            let ticket = client.ticket();
            if waits {
                client.pause = Pause::Quiet;
            }
            self.weaves.all[number as usize] = Some(Weave {
                serial,
                client: slot,
                generation: client.generation,
                ticket,
                protocol: client.state.protocol,
                places: parts.places,
                replies: vec![Vec::new(); blocks],
                missing: blocks,
                local: parts.local,
                db: (parts.db != client.state.db).then_some(parts.db),
                watched,
            });
        }
        number
    }

    fn send_blocks(&mut self, slot: u32, number: u32, db: u16, blocks: &[Block]) {
        let Some(weave) = self.weaves.get(number) else {
            return;
        };
        let (generation, protocol) = (weave.ticket.0, weave.protocol);
        for (at, block) in blocks.iter().enumerate() {
            let entry = Entry {
                client: slot,
                generation,
                seq: at as u32,
                aux: number,
                part: block.commands as u16 + 2,
                db,
                effect: block.effect(),
                ..Entry::own(Kind::Weave)
            };
            let client = self.sessions.get(slot);
            let own = client.map(|client| client.lane(block.shard).0);
            let no = own.unwrap_or(lane_no(block.shard, protocol));
            let lane = &mut self.lanes[no as usize];
            lane.submit(entry, &block.frame, self.now_us, &mut self.out);
        }
    }

    /// EXEC of a client that watches: on the line of its WATCH.
    fn exec_watched(&mut self, slot: u32, mut parts: Parts) -> Flow {
        let alone = parts.blocks.len() == 1; // or keys have moved to other shards since
        let (taken, block) = (self.take_watch(slot), parts.blocks.pop());
        let (Some(Ok(line)), Some(block), true) = (taken, block, alone) else {
            if let Some(Ok(line)) = taken {
                self.drop_private(line);
            }
            let protocol = self.sessions.get(slot).map(|client| client.state.protocol);
            return self.reply_with(slot, |out| {
                write::write_null_array(out, protocol.unwrap_or_default());
            });
        };
        let db = self.sessions.get(slot).map_or(0, |client| client.state.db);
        self.select_private(line, db);
        self.write_line(line, |out| out.extend_from_slice(&block.frame));
        let watched = Watched {
            line,
            shard: block.shard,
            replies: block.commands as u32 + 2,
            read_only: block.read_only,
            frame: block.frame,
            watch: BlockWatch::default(),
            until_us: self.now_us + SILENCE_LIMIT_US,
            confirming: None,
        };
        self.out.unsteady = true;
        let number = self.begin_weave(slot, parts, 1, Some(watched), true);
        if let Some(line) = self.lines.get_mut(line) {
            line.user = Use::Exec { number };
        }
        Flow::Taken
    }

    /// What the line of a watched EXEC has to say.
    pub(super) fn exec_event(&mut self, no: LineNo, number: u32, event: LineEvent<'_>) {
        let Some(weave) = self.weaves.get(number) else {
            return;
        };
        let mut nil = Vec::new();
        write::write_null_array(&mut nil, weave.protocol);
        let Some(watched) = weave.watched.as_mut() else {
            return;
        };
        let shard = watched.shard;
        let event = match (event, watched.confirming.take()) {
            (LineEvent::Reply(answer), Some(reply)) => {
                return self.exec_confirmed(no, number, answer, reply);
            }
            (event, kept) => {
                watched.confirming = kept;
                event
            }
        };
        let (reply, clean) = match event {
            LineEvent::Ready => return,
            LineEvent::Lost(_) => (watched.lost(nil), false),
            LineEvent::Reply(reply) => {
                let step = watched.watch.reply(reply, watched.replies, &watched.frame);
                match step {
                    BlockStep::More => return,
                    BlockStep::Done(BlockVerdict::Deliver) => {
                        let (reply, read_only) = (reply.to_vec(), watched.read_only);
                        if self.must_confirm(read_only, &reply) {
                            return self.confirm_exec(no, number, reply);
                        }
                        (reply, true)
                    }
                    BlockStep::Done(BlockVerdict::Aborted(reply)) => (reply, true),
                    // Nothing was executed, and the client must expect that.
                    BlockStep::Done(BlockVerdict::NotExecuted(_)) => (nil, false),
                    BlockStep::Done(BlockVerdict::Torn) => (error_line(TORN), false),
                }
            }
        };
        let lost = matches!(event, LineEvent::Lost(_));
        if let Some(weave) = self.weaves.get(number) {
            weave.watched = None;
        }
        if lost {
            self.privates.forget(shard);
        } else if clean {
            self.give_private(no);
        } else {
            self.drop_private(no);
        }
        self.weave_part(number, 0, &reply);
    }
}

impl Core {
    /// A watched EXEC was executed: do enough replicas have it?
    fn confirm_exec(&mut self, no: LineNo, number: u32, reply: Vec<u8>) {
        let until_us = self.ask_confirmation(no);
        let weave = self.weaves.get(number);
        if let Some(watched) = weave.and_then(|weave| weave.watched.as_mut()) {
            watched.confirming = Some(reply);
            watched.until_us = until_us;
        }
    }

    fn exec_confirmed(&mut self, no: LineNo, number: u32, answer: &[u8], reply: Vec<u8>) {
        let reply = self.judge_confirmation(answer, reply);
        if let Some(weave) = self.weaves.get(number) {
            weave.watched = None;
        }
        self.give_private(no);
        self.weave_part(number, 0, &reply);
    }

    /// Takes the reply of a block.
    pub(super) fn weave_part(&mut self, number: u32, at: u32, reply: &[u8]) {
        let Some(weave) = self.weaves.get(number) else {
            return;
        };
        weave.replies[at as usize] = reply.to_vec();
        weave.missing -= 1;
        if weave.missing == 0 {
            self.go_on(number);
        }
    }

    /// All blocks are executed: the commands of the proxy are next.
    fn go_on(&mut self, number: u32) {
        let Some(weave) = self.weaves.get(number) else {
            return;
        };
        if let Some(failure) = weave.failure().map(<[u8]>::to_vec) {
            return self.end_weave(number, &failure);
        }
        let (client, generation, db) = (weave.client, weave.generation, weave.db);
        if weave.local.is_empty() {
            let reply = weave.compose();
            self.end_weave(number, &reply);
        } else {
            self.weaves.due.push(number);
            self.out.unsteady = true; // they run in the next phase of the turn
        }
        if let Some(db) = db
            && let Some(client) = self.sessions.get_same(client, generation)
        {
            client.state.db = db;
        }
    }

    fn end_weave(&mut self, number: u32, reply: &[u8]) {
        let Some(weave) = self
            .weaves
            .all
            .get_mut(number as usize)
            .and_then(Option::take)
        else {
            return;
        };
        self.weaves.free.push(number);
        self.counters.errors += u64::from(reply.first() == Some(&b'-'));
        let (client, (generation, seq)) = (weave.client, weave.ticket);
        self.sessions
            .deliver(client, generation, seq, reply, &mut NoOutlet);
        self.sessions.resume_quiet(client, weave.generation);
    }

    /// Runs commands of the proxy, and takes the replies to those that took their time.
    pub(super) fn run_weaves(&mut self) {
        for (serial, reply) in std::mem::take(&mut self.sessions.captured) {
            let is_it = |weave: &Option<Weave>| weave.as_ref().is_some_and(|w| w.serial == serial);
            if let Some(number) = self.weaves.all.iter().position(is_it) {
                self.local_answered(number as u32, &reply);
                self.weaves.due.push(number as u32);
            }
        }
        while let Some(number) = self.weaves.due.pop() {
            while self.run_local(number) {}
        }
    }

    /// Runs the next command. True if it was answered at once.
    fn run_local(&mut self, number: u32) -> bool {
        let Some(weave) = self.weaves.get(number) else {
            return false;
        };
        let (slot, generation, serial) = (weave.client, weave.generation, weave.serial);
        let (next, client) = (
            weave.local.pop_front(),
            self.sessions.get_same(slot, generation),
        );
        let (Some(frame), Some(client)) = (next, client) else {
            let reply = self.weaves.get(number).map(|weave| weave.compose());
            self.end_weave(number, &reply.unwrap_or_default());
            return false;
        };
        client.begin_capture(serial);
        let mut args = Args::new();
        let parsed = RequestParser::new().parse(&frame, &mut args);
        let request = Request {
            frame: &frame,
            args: &args,
        };
        let command = slotmesh_command::resolve(&request);
        let flow = match (parsed, command) {
            (Ok(Parsed::Complete { .. }), Ok(command)) => self.route(slot, command, request),
            _ => Flow::NotYet,
        };
        let at = (self.sessions.captured.iter()).position(|(of, _)| *of == serial);
        if let Some(at) = at {
            let (_, reply) = self.sessions.captured.swap_remove(at);
            self.local_answered(number, &reply);
        } else if flow != Flow::Taken {
            self.local_answered(number, &error_line(NOT_HERE));
        } else {
            return false; // the reply comes later
        }
        true
    }

    fn local_answered(&mut self, number: u32, reply: &[u8]) {
        let Some(weave) = self.weaves.get(number) else {
            return;
        };
        weave.put(reply);
        let (slot, generation) = (weave.client, weave.generation);
        if let Some(client) = self.sessions.get_same(slot, generation) {
            client.end_capture();
        }
    }

    /// The primary of a watched EXEC is not one any more: it has until then to answer.
    pub(super) fn hurry_exec(&mut self, number: u32, until_us: u64) {
        let weave = self.weaves.get(number);
        if let Some(watched) = weave.and_then(|weave| weave.watched.as_mut()) {
            watched.until_us = watched.until_us.min(until_us);
            self.out.unsteady = true;
        }
    }

    /// Gives up lines that are silent for too long. Returns when to look again.
    pub(super) fn weaves_on_time(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        for number in 0..self.weaves.all.len() as u32 {
            let weave = self.weaves.get(number);
            let watched = weave.and_then(|weave| weave.watched.as_ref());
            if let Some(line) = watched.filter(|w| w.until_us <= now_us).map(|w| w.line) {
                self.line_lost(line);
            }
        }
        let weaves = self.weaves.all.iter().flatten();
        let watched = weaves.filter_map(|weave| weave.watched.as_ref());
        watched.map(|watched| watched.until_us).min()
    }
}
