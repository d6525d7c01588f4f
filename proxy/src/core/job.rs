//! Commands that take several rounds of requests to nodes: computed over shards, walked, merged.
//!
//! Invariants: a job starts when nothing of its client is in flight, and the client's next command
//! waits until the job has answered, so its order holds. A job whose client left runs to its end,
//! or a half-done RENAME would stay. What a job holds is bounded by the parameter `job_bytes_max`.

use std::sync::Arc;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::call::{Call, Ticket};
use super::client::{NOBODY, Pause};
use super::dispatch::{Flow, NOT_SERVED};
use super::lane::lane_no;
use super::queue::{Entry, Kind};
use super::retry::Effect;
use super::sessions::NoOutlet;
use super::unknown::Purpose;
use crate::routing::{NO_SHARD, RoutingTable, ShardNo};

/// What a job does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Its requests are in the round; it is called again with all replies.
    Asked,
    /// The round has its reply.
    Done,
}

/// The replies of a round, in the order of its requests: each one whole RESP2 frame (of a block,
/// EXEC's reply). A reply may be an error.
pub(super) type Answers = Vec<Vec<u8>>;

/// A command in several rounds. It is plain state: called first without answers, then with those of
/// the round before.
pub(super) trait Job: std::fmt::Debug + Send {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step;
}

/// One request of a round.
#[derive(Debug)]
pub(super) enum Ask {
    /// To the primary of a shard, over the connection that all share.
    Shard {
        shard: ShardNo,
        db: u16,
        effect: Effect,
        /// 0: one command. Else MULTI, the commands and EXEC, and this many replies.
        block_replies: u16,
        frame: Vec<u8>,
    },
    /// To a replica of a shard, as observer.
    Replica {
        shard: ShardNo,
        replica: usize,
        frame: Vec<u8>,
    },
    /// To the primary of a shard over a connection of its own, past everything that waits there.
    Aside { shard: ShardNo, frame: Vec<u8> },
    /// To the rest of the process.
    Call(Call),
}

/// Most commands of a block, so that its replies can be counted.
pub(super) const BLOCK_COMMANDS_MAX: usize = u16::MAX as usize - 2;

/// What a job sees and leaves when it is called.
#[derive(Debug)]
pub(super) struct Round<'a> {
    pub(super) table: &'a RoutingTable,
    /// The client's database.
    pub(super) db: u16,
    /// How the client's reply is written; answers of nodes are always RESP2.
    pub(super) protocol: Protocol,
    pub(super) now_unix_us: u64,
    pub(super) asks: Vec<Ask>,
    pub(super) reply: Vec<u8>,
}

impl Round<'_> {
    /// The shard of a key. Every slot is served when a job starts; if not, the job is refused.
    pub(super) fn shard_of(&self, key: &[u8]) -> ShardNo {
        self.table.shard_of(key)
    }

    /// Asks the owner of `key`, in the client's database.
    pub(super) fn ask_owner(&mut self, key: &[u8], effect: Effect, command: &[&[u8]]) {
        self.ask(self.table.shard_of(key), effect, command);
    }

    /// Asks a shard, in the client's database.
    pub(super) fn ask(&mut self, shard: ShardNo, effect: Effect, command: &[&[u8]]) {
        self.ask_in(shard, self.db, effect, command);
    }

    /// Asks a shard, in any database.
    pub(super) fn ask_in(&mut self, shard: ShardNo, db: u16, effect: Effect, command: &[&[u8]]) {
        let mut frame = Vec::new();
        write::encode_command(&mut frame, command);
        self.push(shard, db, effect, 0, frame);
    }

    /// Commands that one shard executes as one, in any database. The answer is EXEC's reply.
    pub(super) fn ask_block(&mut self, shard: ShardNo, db: u16, commands: &[Vec<&[u8]>]) {
        let mut frame = Vec::new();
        write::encode_command(&mut frame, &[b"MULTI"]);
        for command in commands {
            write::encode_command(&mut frame, command);
        }
        write::encode_command(&mut frame, &[b"EXEC"]);
        debug_assert!(commands.len() <= BLOCK_COMMANDS_MAX);
        self.push(shard, db, Effect::Write, commands.len() as u16 + 2, frame);
    }

    /// Asks a replica of a shard. The answer is an error if there is none of this number.
    pub(super) fn ask_replica(&mut self, shard: ShardNo, replica: usize, command: &[&[u8]]) {
        let mut frame = Vec::new();
        write::encode_command(&mut frame, command);
        self.asks.push(Ask::Replica {
            shard,
            replica,
            frame,
        });
    }

    /// Asks a primary past what waits for it: to kill a script that its other connections wait for.
    pub(super) fn ask_aside(&mut self, shard: ShardNo, command: &[&[u8]]) {
        let mut frame = Vec::new();
        write::encode_command(&mut frame, command);
        self.asks.push(Ask::Aside { shard, frame });
    }

    /// Asks the rest of the process.
    pub(super) fn call(&mut self, call: Call) {
        self.asks.push(Ask::Call(call));
    }

    fn push(&mut self, shard: ShardNo, db: u16, effect: Effect, replies: u16, frame: Vec<u8>) {
        self.asks.push(Ask::Shard {
            shard,
            db,
            effect,
            block_replies: replies,
            frame,
        });
    }

    fn is_unserved(&self) -> bool {
        let unserved = |ask: &Ask| matches!(ask, Ask::Shard { shard, .. } if *shard == NO_SHARD);
        self.asks.iter().any(unserved)
    }

    /// Ends the job with an error (its text without `-`).
    pub(super) fn fail(&mut self, text: &[u8]) -> Step {
        self.reply.clear();
        write::write_error(&mut self.reply, text);
        Step::Done
    }

    /// Ends the job with what a node answered. Only for replies that are the same in RESP2 and
    /// RESP3: errors, integers, simple strings, bulk strings.
    pub(super) fn pass(&mut self, answer: &[u8]) -> Step {
        self.reply.clear();
        self.reply.extend_from_slice(answer);
        Step::Done
    }

    /// Ends the job with a reply.
    pub(super) fn done(&mut self, write: impl FnOnce(&mut Vec<u8>, Protocol)) -> Step {
        self.reply.clear();
        write(&mut self.reply, self.protocol);
        Step::Done
    }
}

const TOO_LARGE: &[u8] =
    b"-ERR slotmesh: the operands of this command are larger than the proxy may hold\r\n";
const UNSERVED: &[u8] = NOT_SERVED.as_bytes();
const NO_REQUEST: &[u8] = b"ERR slotmesh: this command could not be carried out";

/// A job that waits for answers, or for room to ask.
#[derive(Debug)]
struct Running {
    job: Box<dyn Job>,
    client: u32,
    generation: u32,
    /// Of the client's reply.
    reply_generation: u32,
    seq: u32,
    protocol: Protocol,
    db: u16,
    /// The client does not see the reply; the core wants it.
    purpose: Option<Purpose>,
    answers: Vec<Option<Vec<u8>>>,
    missing: usize,
    bytes: usize,
    /// The next round, until there is room for all of it.
    parked: Vec<Ask>,
}

/// All jobs of a worker.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// What one job may gather in one round; past it the command is refused.
    pub(super) bytes_max: usize,
    running: Vec<Option<Running>>,
    free: Vec<u32>,
    /// Jobs that have all their answers, or have just begun.
    due: Vec<u32>,
    /// Jobs whose next round found no room.
    parked: Vec<u32>,
}

impl Jobs {
    /// True if a job of the client runs.
    pub(super) fn has_one_of(&self, slot: u32) -> bool {
        let mut running = self.running.iter().flatten();
        running.any(|running| running.client == slot)
    }

    /// Takes the answer to a request.
    pub(super) fn answer(&mut self, number: u32, index: u32, reply: &[u8]) {
        let bytes_max = self.bytes_max;
        let Some(running) = self
            .running
            .get_mut(number as usize)
            .and_then(Option::as_mut)
        else {
            return;
        };
        let Some(place @ None) = running.answers.get_mut(index as usize) else {
            return;
        };
        running.bytes += reply.len();
        let fits = running.bytes <= bytes_max;
        *place = Some(if fits { reply } else { TOO_LARGE }.to_vec());
        if !fits {
            // What came so far is of no use any more.
            for answer in running.answers.iter_mut().flatten() {
                *answer = TOO_LARGE.to_vec();
            }
        }
        running.missing -= 1;
        if running.missing == 0 {
            self.due.push(number);
        }
    }
}

impl Core {
    /// Starts a job as the client's next request; the client waits until it has answered.
    pub(super) fn start_job(&mut self, slot: u32, job: Box<dyn Job>) -> Flow {
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        if client.in_flight() > 0 && !client.is_captured() {
            return Flow::NotYet;
        }
        let ticket = client.ticket();
        client.pause = Pause::Quiet;
        self.run_new_job(slot, job, ticket, None);
        Flow::Taken
    }

    /// Starts a job for the core itself, before a client's next command is taken.
    pub(super) fn start_unseen_job(&mut self, slot: u32, job: Box<dyn Job>, purpose: Purpose) {
        let idle = self.sessions.get(slot).is_some_and(|c| c.in_flight() == 0);
        if idle {
            self.run_new_job(slot, job, (NOBODY, 0), Some(purpose));
        }
    }

    fn run_new_job(
        &mut self,
        slot: u32,
        job: Box<dyn Job>,
        (reply_generation, seq): (u32, u32),
        purpose: Option<Purpose>,
    ) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let running = Running {
            job,
            client: slot,
            generation: client.generation,
            reply_generation,
            seq,
            protocol: client.state.protocol,
            db: client.state.db,
            purpose,
            answers: Vec::new(),
            missing: 0,
            bytes: 0,
            parked: Vec::new(),
        };
        let number = self.jobs.free.pop().unwrap_or_else(|| {
            self.jobs.running.push(None);
            (self.jobs.running.len() - 1) as u32
        });
        self.jobs.running[number as usize] = Some(running);
        self.jobs.due.push(number);
        self.run_jobs();
    }

    /// Goes on with every job that can.
    pub(super) fn run_jobs(&mut self) {
        while let Some(number) = self.jobs.due.pop() {
            self.run_job(number);
        }
    }

    fn run_job(&mut self, number: u32) {
        let Some(running) = self.jobs.running[number as usize].as_mut() else {
            return;
        };
        let answers = std::mem::take(&mut running.answers);
        running.bytes = 0;
        let table = Arc::clone(&self.table);
        let mut round = Round {
            table: &table,
            db: running.db,
            protocol: running.protocol,
            now_unix_us: self.now_unix_us,
            asks: Vec::new(),
            reply: Vec::new(),
        };
        let mut step = running
            .job
            .next(answers.into_iter().flatten().collect(), &mut round);
        if step == Step::Asked && round.is_unserved() {
            step = round.fail(UNSERVED);
        } else if step == Step::Asked && round.asks.is_empty() {
            debug_assert!(
                false,
                "a job that neither asks nor answers: {:?}",
                running.job
            );
            step = round.fail(NO_REQUEST);
        }
        if step == Step::Done {
            let reply = round.reply;
            return self.end_job(number, &reply);
        }
        running.parked = round.asks;
        self.send_round(number);
    }

    fn end_job(&mut self, number: u32, reply: &[u8]) {
        let Some(done) = self.jobs.running[number as usize].take() else {
            return;
        };
        self.jobs.free.push(number);
        if let Some(purpose) = done.purpose {
            self.found_out(purpose, reply);
            return self.sessions.resume_quiet(done.client, done.generation);
        }
        self.counters.errors += u64::from(reply.first() == Some(&b'-'));
        let (client, generation, seq) = (done.client, done.reply_generation, done.seq);
        self.sessions
            .deliver(client, generation, seq, reply, &mut NoOutlet);
        self.sessions.resume_quiet(client, done.generation);
    }

    /// Sends a job's round if there is room for all of it, or parks it.
    fn send_round(&mut self, number: u32) {
        let Some(running) = self.jobs.running[number as usize].as_mut() else {
            return;
        };
        let hold_bytes_max = self.table.settings.hold_bytes_max;
        for ask in &running.parked {
            let Ask::Shard { shard, .. } = ask else {
                continue;
            };
            let lane = &mut self.lanes[lane_no(*shard, Protocol::Resp2) as usize];
            if !lane.has_room(hold_bytes_max) {
                lane.note_full(self.now_us, &mut self.out);
                self.jobs.parked.push(number);
                return;
            }
        }
        let asks = std::mem::take(&mut running.parked);
        running.missing = asks.len();
        running.answers.resize_with(asks.len(), || None);
        let (client, generation) = (running.client, running.generation);
        for (index, ask) in asks.into_iter().enumerate() {
            let ticket = Ticket {
                job: number,
                index: index as u32,
            };
            match ask {
                Ask::Shard {
                    shard,
                    db,
                    effect,
                    block_replies,
                    frame,
                } => {
                    let entry = Entry {
                        client,
                        generation,
                        seq: ticket.index,
                        aux: number,
                        part: block_replies,
                        db,
                        effect,
                        ..Entry::own(if block_replies > 0 {
                            Kind::JobBlock
                        } else {
                            Kind::Job
                        })
                    };
                    let lane = &mut self.lanes[lane_no(shard, Protocol::Resp2) as usize];
                    lane.submit(entry, &frame, self.now_us, &mut self.out);
                }
                Ask::Replica {
                    shard,
                    replica,
                    frame,
                } => self.ask_line(ticket, shard, Some(replica), &frame),
                Ask::Aside { shard, frame } => self.ask_line(ticket, shard, None, &frame),
                Ask::Call(call) => self.out.calls.push((ticket, call)),
            }
        }
    }

    /// Jobs that found no room try again.
    pub(super) fn resume_parked(&mut self) {
        for number in std::mem::take(&mut self.jobs.parked) {
            self.send_round(number);
        }
    }

    /// The answer to a call of this worker: one RESP2 frame.
    pub fn call_answered(&mut self, ticket: Ticket, reply: &[u8]) {
        self.renew_health(); // CONFIG SET may have changed it
        if ticket.job == super::tracking_remote::REDIRECTED {
            return self.redirect_answered(ticket.index, reply);
        }
        self.jobs.answer(ticket.job, ticket.index, reply);
        self.run_jobs();
    }
}
