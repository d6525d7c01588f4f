//! Connections of the proxy to a node that are not shared by its clients: for a command that waits,
//! a WATCH, subscriptions, MONITOR, or one question to a replica.
//!
//! Invariants: a line has one user at a time ([`Use`]), and everything that happens to it is told to
//! that user, once (`Core::line_event`). A line is never used for another login or node than it
//! was opened for. A line does no I/O: like a lane it leaves orders for the worker.
//!
//! Numbers of lines have [`LINE_BIT`] set, so that worker and outbox treat them like lanes.

mod loose;

use std::net::SocketAddr;

use slotmesh_resp::{Protocol, ReplyScanner, Scan, parse_i64, write};

use super::Core;
use super::answer::NodeFault;
use super::call::Ticket;
use super::lane::LaneNo;
use super::monitor::Source;
use super::outbox::Order;
use crate::routing::{Login, ShardNo};

pub use self::loose::LooseLine;

/// Set in the number of a line, never in that of a lane.
pub const LINE_BIT: LaneNo = 1 << 31;
/// An attempt to connect and log in fails after this, as a lane's.
const OPEN_LIMIT_US: u64 = 1_000_000;

/// Number of a line: [`LINE_BIT`] and its index.
pub type LineNo = LaneNo;

/// Who uses a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A shard's messages for this worker's clients.
    Feed(ShardNo),
    /// What a node executes.
    Monitor(Source),
    /// Which keys change at a shard.
    Track(ShardNo),
    /// One question of a job to a replica.
    Question(Ticket),
    /// Nobody yet: see `super::private`.
    Spare,
    /// A part of a command that waits.
    Wait { number: u32, part: u16 },
    /// A client's WATCH.
    Watch { client: u32, generation: u32 },
    /// EXEC of a client with a WATCH.
    Exec { number: u32 },
    /// One CLIENT UNBLOCK.
    Unblock,
    /// One question whether the node would refuse a command.
    Health,
    /// Whether the node of a lane is busy.
    Busy(LaneNo),
    /// What a client that tracks has others told.
    Mail { client: u32, generation: u32 },
}

/// What happened to a line. After `Lost` its number is no longer the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineEvent<'a> {
    /// It is logged in.
    Ready,
    /// A whole reply, or a push.
    Reply(&'a [u8]),
    /// It is gone, or was never made. With the node's words if it refused the login.
    Lost(Option<&'a [u8]>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Until then it must be logged in.
    Opening {
        until_us: u64,
        login_sent: bool,
    },
    Up,
}

#[derive(Debug)]
pub(super) struct Line {
    pub(super) user: Use,
    pub(super) shard: ShardNo,
    /// Of the shard when it was opened.
    pub(super) epoch: u64,
    /// The node's database for it.
    pub(super) db: u16,
    pub(super) protocol: Protocol,
    /// Replies to come that are not its user's ([`Core::write_own`]).
    pub(super) own_replies: u32,
    /// What the node calls this connection, once it has said so.
    pub(super) node_id: Option<i64>,
    /// Tells it from others that had its number.
    serial: u64,
    login: Login,
    state: State,
    /// Written before the login was answered; sent after it.
    queued: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    scanner: ReplyScanner,
    touched: bool,
}

impl Line {
    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Bytes that wait to be sent.
    pub(super) fn unsent_len(&self) -> usize {
        self.queued.len() + self.output.len() - self.sent
    }
}

/// What is opened.
#[derive(Debug)]
pub(super) struct Opening {
    pub(super) user: Use,
    pub(super) shard: ShardNo,
    pub(super) epoch: u64,
    pub(super) address: SocketAddr,
    pub(super) login: Login,
    pub(super) protocol: Protocol,
}

/// All lines of a worker.
#[derive(Debug, Default)]
pub(super) struct Lines {
    lines: Vec<Option<Line>>,
    free: Vec<u32>,
    /// Lines that are being opened; each has a deadline.
    opening: Vec<LineNo>,
    /// So many were opened so far.
    opened: u64,
}

impl Lines {
    pub(super) fn get(&self, no: LineNo) -> Option<&Line> {
        self.lines.get((no & !LINE_BIT) as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, no: LineNo) -> Option<&mut Line> {
        self.lines.get_mut((no & !LINE_BIT) as usize)?.as_mut()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (LineNo, &Line)> {
        let numbered = self.lines.iter().enumerate();
        numbered.filter_map(|(no, line)| Some((no as u32 | LINE_BIT, line.as_ref()?)))
    }
}

/// True if the number is one of a line.
#[inline]
pub fn is_line(no: LaneNo) -> bool {
    no & LINE_BIT != 0
}

impl Core {
    /// Opens a line. `Ready` or `Lost` follows, never within this call.
    pub(super) fn open_line(&mut self, opening: Opening) -> LineNo {
        let index = self.lines.free.pop().unwrap_or_else(|| {
            self.lines.lines.push(None);
            (self.lines.lines.len() - 1) as u32
        });
        let no = index | LINE_BIT;
        self.lines.opened += 1;
        let address = opening.address;
        self.lines.lines[index as usize] = Some(Line {
            user: opening.user,
            shard: opening.shard,
            epoch: opening.epoch,
            db: 0,
            protocol: opening.protocol,
            own_replies: 0,
            node_id: None,
            serial: self.lines.opened,
            login: opening.login,
            state: State::Opening {
                until_us: self.now_us + OPEN_LIMIT_US,
                login_sent: false,
            },
            queued: Vec::new(),
            output: Vec::new(),
            sent: 0,
            input: Vec::new(),
            scanner: ReplyScanner::new(),
            touched: false,
        });
        self.lines.opening.push(no);
        self.out.unsteady = true;
        self.out.orders.push(Order::Dial { lane: no, address });
        no
    }

    /// Appends to what is sent over a line, once it is logged in.
    pub(super) fn write_line(&mut self, no: LineNo, write: impl FnOnce(&mut Vec<u8>)) {
        match self.lines.get_mut(no) {
            Some(line) if line.is_up() => write(&mut line.output),
            Some(line) => return write(&mut line.queued),
            None => return,
        }
        self.touch_line(no);
    }

    /// Closes a line; its user hears nothing more.
    pub(super) fn close_line(&mut self, no: LineNo) {
        let index = no & !LINE_BIT;
        if (self.lines.lines.get_mut(index as usize)).is_some_and(|line| line.take().is_some()) {
            self.lines.free.push(index);
            self.lines.opening.retain(|other| *other != no);
            self.out.orders.push(Order::Hangup { lane: no });
        }
    }

    /// Tells the user of a line what happened to it.
    fn line_event(&mut self, no: LineNo, user: Use, event: LineEvent<'_>) {
        match user {
            Use::Question(ticket) => self.question_event(no, ticket, event),
            Use::Feed(shard) => self.feed_event(no, shard, event),
            Use::Monitor(source) => self.monitor_event(no, source, event),
            Use::Track(shard) => self.track_event(no, shard, event),
            Use::Spare => self.spare_event(no, event),
            Use::Wait { number, part } => self.wait_event(no, number, part, event),
            Use::Watch { client, generation } => self.watch_event(no, client, generation, event),
            Use::Exec { number } => self.exec_event(no, number, event),
            Use::Unblock => self.unblock_event(no, event),
            Use::Health => self.health_event(no, event),
            Use::Busy(lane) => self.busy_event(lane, event),
            Use::Mail { client, generation } => self.mail_event(no, (client, generation), event),
        }
    }

    /// The line cannot be used any more: closes it and tells its user.
    fn lose_line(&mut self, no: LineNo, words: Option<&[u8]>) {
        if let Some(user) = self.lines.get(no).map(|line| line.user) {
            self.close_line(no);
            self.line_event(no, user, LineEvent::Lost(words));
        }
    }

    pub(super) fn touch_line(&mut self, no: LineNo) {
        if let Some(line) = self.lines.get_mut(no)
            && !std::mem::replace(&mut line.touched, true)
        {
            self.out.touched.push(no);
        }
    }

    pub(super) fn line_untouch(&mut self, no: LineNo) {
        if let Some(line) = self.lines.get_mut(no) {
            line.touched = false;
        }
    }

    pub(super) fn line_unsent(&self, no: LineNo) -> &[u8] {
        let line = self.lines.get(no);
        line.map_or(&[], |line| &line.output[line.sent..])
    }

    pub(super) fn line_sent(&mut self, no: LineNo, bytes: usize) {
        let Some(line) = self.lines.get_mut(no) else {
            return;
        };
        line.sent += bytes;
        if line.sent == line.output.len() {
            line.output = Vec::new(); // most lines are silent for long
            line.sent = 0;
        }
    }

    pub(super) fn line_input(&mut self, no: LineNo) -> Option<&mut Vec<u8>> {
        self.lines.get_mut(no).map(|line| &mut line.input)
    }

    /// The connection stands: log in.
    pub(super) fn line_connected(&mut self, no: LineNo) {
        let Some(line) = self.lines.get_mut(no) else {
            return;
        };
        let State::Opening {
            login_sent: sent @ false,
            ..
        } = &mut line.state
        else {
            return;
        };
        *sent = true;
        let (user, password) = (
            line.login.username.as_bytes(),
            line.login.password.as_bytes(),
        );
        match line.protocol {
            Protocol::Resp2 => write::encode_command(&mut line.output, &[b"AUTH", user, password]),
            Protocol::Resp3 => {
                let hello: &[&[u8]] = &[b"HELLO", b"3", b"AUTH", user, password];
                write::encode_command(&mut line.output, hello);
            }
        }
        self.touch_line(no);
    }

    /// The connection is gone, or could not be made.
    pub(super) fn line_lost(&mut self, no: LineNo) {
        self.lose_line(no, None);
    }

    pub(super) fn line_bytes(&mut self, no: LineNo, buf: &[u8]) -> Result<usize, NodeFault> {
        let mut at = 0;
        let serial = self.lines.get(no).map(|line| line.serial);
        while at < buf.len() {
            let same = |line: &&mut Line| Some(line.serial) == serial;
            let Some(line) = self.lines.get_mut(no).filter(same) else {
                return Ok(buf.len()); // its user closed it
            };
            let Scan::Complete { consumed, .. } = line.scanner.scan(&buf[at..])? else {
                break;
            };
            let reply = &buf[at..at + consumed];
            at += consumed;
            if line.state != State::Up {
                self.line_greeted(no, reply);
                continue;
            }
            if line.own_replies > 0 {
                self.own_reply(no, reply);
                continue;
            }
            let user = line.user;
            self.line_event(no, user, LineEvent::Reply(reply));
        }
        Ok(at)
    }

    /// The reply to a command of the proxy's own: CLIENT ID, or one that answers OK.
    fn own_reply(&mut self, no: LineNo, reply: &[u8]) {
        // An engine that does not know a command does not need it from us either.
        if reply.first() == Some(&b'-') && !reply.starts_with(b"-ERR unknown command") {
            return self.lose_line(no, Some(reply));
        }
        if let Some(line) = self.lines.get_mut(no) {
            line.own_replies -= 1;
            if let Some(number) = reply.strip_prefix(b":") {
                line.node_id = parse_i64(number.trim_ascii_end());
            }
        }
    }

    /// The reply to the login.
    fn line_greeted(&mut self, no: LineNo, reply: &[u8]) {
        if reply.first() == Some(&b'-') {
            return self.lose_line(no, Some(reply));
        }
        let Some(line) = self.lines.get_mut(no) else {
            return;
        };
        line.state = State::Up;
        let queued = std::mem::take(&mut line.queued);
        line.output.extend_from_slice(&queued);
        let user = line.user;
        self.touch_line(no);
        self.lines.opening.retain(|other| *other != no);
        self.line_event(no, user, LineEvent::Ready);
    }

    /// Gives up lines that take too long to open. Returns when to look again.
    pub(super) fn lines_on_time(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        let until = |lines: &Lines, no: &LineNo| match lines.get(*no)?.state {
            State::Opening { until_us, .. } => Some(until_us),
            State::Up => None,
        };
        let late = |no: &LineNo| until(&self.lines, no).is_some_and(|at| at <= now_us);
        let late: Vec<_> = self.lines.opening.iter().copied().filter(late).collect();
        for no in late {
            self.lose_line(no, None);
        }
        let opening = self.lines.opening.iter();
        opening.filter_map(|no| until(&self.lines, no)).min()
    }

    /// Asks the primary or a replica one question over a line of its own.
    pub(super) fn ask_line(
        &mut self,
        ticket: Ticket,
        shard: ShardNo,
        replica: Option<usize>,
        frame: &[u8],
    ) {
        let route = self.table.shards.get(usize::from(shard)).cloned().flatten();
        let found = route.and_then(|route| match replica {
            Some(replica) => {
                let address = *route.replicas.get(replica)?;
                Some((route.epoch, address, route.observer.clone()?))
            }
            None => {
                let login = Login {
                    username: route.username.clone(),
                    password: route.password.clone(),
                };
                Some((route.epoch, route.address, login))
            }
        });
        let Some((epoch, address, login)) = found else {
            return self
                .jobs
                .answer(ticket.job, ticket.index, b"-ERR no such db node\r\n");
        };
        let no = self.open_line(Opening {
            user: Use::Question(ticket),
            shard,
            epoch,
            address,
            login,
            protocol: Protocol::Resp2,
        });
        self.write_line(no, |out| out.extend_from_slice(frame));
    }

    fn question_event(&mut self, no: LineNo, ticket: Ticket, event: LineEvent<'_>) {
        match event {
            LineEvent::Ready => {}
            LineEvent::Reply(reply) => {
                self.jobs.answer(ticket.job, ticket.index, reply);
                self.close_line(no);
            }
            LineEvent::Lost(words) => {
                let error = b"-ERR slotmesh: the node could not be reached\r\n";
                let error = words.unwrap_or(error);
                self.jobs.answer(ticket.job, ticket.index, error);
            }
        }
    }
}
