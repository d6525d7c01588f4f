//! What a client sends: each command goes to its shard's lane, or is answered here.
//!
//! Invariant: a command is either taken whole (numbered, and answered some day) or not at all
//! (the client waits for room and its bytes stay).

use slotmesh_command::{Class, Command};
use slotmesh_resp::{Args, Limits, Parsed, ProtocolError, rewrite_inline, write};

use super::Core;
use super::client::Pause;
use super::queue::{Entry, Kind};
use super::retry::Effect;
use super::sessions::{CloseReason, NoOutlet};
use super::spec::{self, Request};
use crate::routing::{NO_SHARD, ShardNo};

pub(super) const CROSS_SLOT: &str = "CROSSSLOT Keys in request don't hash to the same slot";
pub(super) const NOT_SERVED: &str = "CLUSTERDOWN Hash slot not served";
pub(super) const NO_AUTH: &str = "NOAUTH Authentication required.";
/// Clients take the word for a reason to come again soon.
pub(super) const NOT_READY: &str =
    "LOADING slotmesh: the proxy has not yet been told about this instance";

/// What became of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// It is on its way, or answered.
    Taken,
    /// No room: the same bytes must be shown again later.
    NoRoom,
    /// It must wait until nothing of this client is in flight; then show the same bytes again.
    NotYet,
}

impl Core {
    /// Takes bytes of a client: the kept beginning, if any, and what came since. Returns how many
    /// were used; keep the others, and show them again with more, or when the client is resumed.
    pub fn client_bytes(&mut self, slot: u32, buf: &[u8]) -> usize {
        let mut at = 0;
        let mut args = std::mem::take(&mut self.args);
        if let Some(client) = self.sessions.get_mut(slot) {
            client.heard_us = self.now_us;
        }
        while at < buf.len() && self.sessions.may_take(slot) {
            let Some(client) = self.sessions.get_mut(slot) else {
                break;
            };
            let limits = if client.state.authenticated {
                Limits::Authenticated
            } else {
                Limits::Unauthenticated
            };
            let parsed = client.parser.parse_within(&buf[at..], &mut args, limits);
            let (consumed, flow) = match parsed {
                Ok(Parsed::Complete { consumed }) => {
                    let request = Request {
                        frame: &buf[at..at + consumed],
                        args: &args,
                    };
                    (consumed, self.command(slot, request))
                }
                Ok(Parsed::Inline { consumed }) => (
                    consumed,
                    self.inline(slot, &buf[at..at + consumed], &mut args),
                ),
                Ok(Parsed::Empty { consumed }) => (consumed, Flow::Taken),
                Ok(Parsed::Incomplete { .. }) => break,
                Err(error) => {
                    self.protocol_error(slot, error);
                    (buf.len() - at, Flow::Taken)
                }
            };
            match flow {
                Flow::Taken => at += consumed,
                Flow::NoRoom | Flow::NotYet => {
                    self.wait(slot, flow);
                    break;
                }
            }
        }
        self.args = args;
        at
    }

    /// Forgets where the parser was: the bytes of the client begin anew.
    fn wait(&mut self, slot: u32, flow: Flow) {
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        client.pause = if flow == Flow::NoRoom {
            Pause::Stalled
        } else {
            Pause::Quiet
        };
        if flow == Flow::NoRoom {
            let generation = client.generation;
            self.stalled.push((slot, generation));
        }
    }

    fn inline(&mut self, slot: u32, line: &[u8], args: &mut Args) -> Flow {
        let mut frame = self.sessions.pool.take();
        let flow = match rewrite_inline(line, &mut frame, args) {
            Ok(()) if args.is_empty() => Flow::Taken,
            Ok(()) => self.command(
                slot,
                Request {
                    frame: &frame,
                    args,
                },
            ),
            Err(error) => {
                self.protocol_error(slot, error);
                Flow::Taken
            }
        };
        self.sessions.pool.give(frame);
        flow
    }

    fn protocol_error(&mut self, slot: u32, error: ProtocolError) {
        self.counters.protocol_errors += 1;
        self.reply_error(slot, &error.reply());
        self.sessions.leave(slot);
    }

    #[inline]
    fn command(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let command = match slotmesh_command::lookup(request.arg(0)) {
            Some(c) if !c.has_subcommands() && c.check_arity(request.len()) => c,
            _ => match slotmesh_command::resolve(&request) {
                Ok(command) => command,
                Err(_) if slotmesh_command::is_http(request.arg(0)) => {
                    self.sessions.doom(slot, CloseReason::Protocol);
                    return Flow::Taken;
                }
                Err(error) => return self.unresolved(slot, request, &error),
            },
        };
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        client.last_command = Some(command);
        client.last_bytes = request.frame.len().min(usize::from(u16::MAX)) as u16;
        if self.paused.is_some()
            && let Some(flow) = self.held_by_pause(slot, command, request)
        {
            return flow;
        }
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        let flow = if client.is_plain() {
            match self.held_back {
                None => self.route(slot, command, request),
                Some(release) => self.route_known(release, slot, command, request),
            }
        } else {
            let skips = client.extra.as_ref().is_some_and(|extra| extra.skips_reply);
            let flow = self.command_special(slot, command, request);
            if skips && flow == Flow::Taken {
                self.skipped(slot);
            }
            flow
        };
        self.counters.commands += u64::from(flow == Flow::Taken);
        flow
    }

    #[inline]
    pub(super) fn route(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        if command.class == Class::SingleKey
            && let Some(key) = command.only_key()
        {
            let shard = self.table.shard_of(request.arg(key));
            let effect = spec::effect(command);
            return self.forward(slot, shard, Kind::Single, effect, 0, request.frame);
        }
        self.route_rare(slot, command, request)
    }

    /// Everything but a command with one key.
    fn route_rare(&mut self, slot: u32, command: &'static Command, request: Request<'_>) -> Flow {
        match command.class {
            Class::Proxy if let Some(flow) = self.refused_while_busy(slot, command) => return flow,
            Class::Proxy => {
                let errors = self.counters.errors;
                let flow = self.local(slot, command, request);
                if flow == Flow::Taken {
                    self.tally.called(command, self.counters.errors > errors);
                }
                return flow;
            }
            Class::Transaction => return self.begin_transaction(slot, command, request),
            Class::Refused(instead) if !self.may_pass(command) => {
                let name = spec::shown(command);
                let text = format!("ERR slotmesh: '{name}' is not for clients: {instead}");
                return self.refuse(slot, text.as_bytes());
            }
            Class::ByIndex if !command.name.ends_with("monitor") => {
                return self.by_index(slot, command, request);
            }
            Class::ByIndex | Class::Monitor => return self.monitor(slot, command, request),
            _ if !spec::is_permitted(command) => return self.unsupported(slot, command),
            _ => {}
        }
        match command.class {
            Class::SplitMerge(merge) => self.split(slot, command, merge, request),
            Class::AllShards(gather) => self.fan_out(slot, command, gather, request),
            Class::Keyless => self.keyless(slot, command, request),
            Class::SameSlot if matches!(command.name.get(..4), Some("eval" | "fcal")) => {
                self.script(slot, command, request)
            }
            Class::SingleKey | Class::Computed | Class::SameSlot | Class::Refused(_) => {
                self.send_to_owner(slot, command, request)
            }
            Class::Blocking if !command.may_wait(&request) => {
                self.send_to_owner(slot, command, request)
            }
            Class::Blocking => self.block(slot, command, request),
            Class::Walk => self.walk(slot, command, request),
            Class::PubSub => self.pubsub_command(slot, command, request),
            _ => self.unsupported(slot, command),
        }
    }

    pub(super) fn send_to_owner(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        match self.shard_of_keys(command, request) {
            Ok(shard) => {
                let effect = spec::effect(command);
                self.forward(slot, shard, Kind::Single, effect, 0, request.frame)
            }
            Err(_) if command.class == Class::Computed => self.compute(slot, command, request),
            Err(text) => self.refuse(slot, text.as_bytes()),
        }
    }

    pub(super) fn unsupported(&mut self, slot: u32, command: &Command) -> Flow {
        let name = spec::shown(command);
        let text = format!("ERR slotmesh: '{name}' is not supported yet through the proxy");
        self.refuse(slot, text.as_bytes())
    }

    /// The one shard of all keys of a command; the keyless shard if it names none.
    pub(super) fn shard_of_keys(
        &self,
        command: &Command,
        request: Request<'_>,
    ) -> Result<ShardNo, &'static str> {
        // Keys that cannot be told: any node refuses the command in its own words.
        let keys = command.keys(&request).unwrap_or_default();
        let mut shard = None;
        for key in keys {
            let own = self.table.shard_of(request.arg(key));
            if shard.is_some_and(|s| s != own) {
                return Err(CROSS_SLOT);
            }
            shard = Some(own);
        }
        let shard = shard.unwrap_or(self.table.keyless_shard());
        self.check_patterns(command, request, shard)?;
        Ok(shard)
    }

    /// Sends a frame to a shard as the client's next request.
    #[inline]
    pub(super) fn forward(
        &mut self,
        slot: u32,
        shard: ShardNo,
        kind: Kind,
        effect: Effect,
        aux: u32,
        frame: &[u8],
    ) -> Flow {
        if shard == NO_SHARD {
            return self.refuse(slot, NOT_SERVED.as_bytes());
        }
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        let (no, part) = client.lane(shard);
        let lane = &mut self.lanes[no as usize];
        if !lane.has_room(self.table.settings.hold_bytes_max) {
            lane.note_full(self.now_us, &mut self.out);
            if let Some(words) = self.busy_words(no) {
                return self.refuse(slot, &words);
            }
            return Flow::NoRoom;
        }
        let (generation, seq) = client.ticket();
        let entry = Entry {
            client: slot,
            generation,
            seq,
            len: 0,
            aux,
            part,
            db: client.state.db,
            kind,
            effect,
            held_at_us: 0,
        };
        lane.submit(entry, frame, self.now_us, &mut self.out);
        Flow::Taken
    }

    /// An error of the proxy itself. Inside MULTI it spoils the transaction, as in Redis.
    pub(super) fn refuse(&mut self, slot: u32, text: &[u8]) -> Flow {
        if let Some(transaction) = self
            .sessions
            .get_mut(slot)
            .and_then(|c| c.state.transaction.as_mut())
        {
            transaction.dirty = true;
        }
        let last = self.sessions.get(slot).and_then(|c| c.last_command);
        if let Some(command) = last {
            self.tally.rejected(command);
        }
        self.reply_error(slot, text)
    }

    pub(super) fn reply_error(&mut self, slot: u32, text: &[u8]) -> Flow {
        self.counters.errors += 1;
        self.tally.error(text);
        self.reply_with(slot, |out| write::write_error(out, text))
    }

    pub(super) fn reply_simple(&mut self, slot: u32, text: &str) -> Flow {
        self.reply_with(slot, |out| write::write_simple(out, text))
    }

    /// Answers a command here. The reply takes its turn among those of the nodes.
    pub(super) fn reply_with(&mut self, slot: u32, write: impl FnOnce(&mut Vec<u8>)) -> Flow {
        self.scratch.clear();
        write(&mut self.scratch);
        if let Some(client) = self.sessions.get_mut(slot) {
            let (generation, seq) = client.ticket();
            self.sessions
                .deliver(slot, generation, seq, &self.scratch, &mut NoOutlet);
        }
        Flow::Taken
    }
}
