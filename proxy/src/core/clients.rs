//! CLIENT and what it says and does about the clients of the whole process.
//!
//! Invariant: a worker touches only its own clients; about others it asks them
//! ([`super::call::Call::Peers`]), itself too, so that there is one way.

use std::fmt::Write as _;

use slotmesh_command::Command;
use slotmesh_resp::{Protocol, Value, parse_i64, write};

use super::Core;
use super::call::{Call, PeerRequest};
use super::client::Client;
use super::dispatch::Flow;
use super::filter::Filter;
use super::job::{Answers, Job, Round, Step};
use super::sessions::CloseReason;
use super::spec::Request;
use super::unblock::Unblock;

const NO_SUCH_CLIENT: &[u8] = b"ERR No such client";
const SYNTAX: &[u8] = b"ERR syntax error";
/// Longest pause: as an overflow of the time would be the alternative.
const PAUSE_MS_MAX: i64 = i64::MAX / 4_000;

/// How the workers' answers become the client's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Merge {
    /// Lines of text, one after the other.
    Lines,
    /// Integers are added.
    Sum,
    /// OK if one of them killed something.
    KilledOne,
    /// OK.
    Ok,
}

/// Asks all workers and merges what they say.
#[derive(Debug)]
pub(super) struct AskPeers {
    pub(super) request: Option<PeerRequest>,
    pub(super) merge: Merge,
}

impl Job for AskPeers {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if let Some(request) = self.request.take() {
            round.call(Call::Peers(request));
            return Step::Asked;
        }
        let answer = answers.first().map_or(&[][..], Vec::as_slice);
        let answers = match Value::decode(answer) {
            Ok(Some((Value::Array(answers), _))) => answers,
            _ => return round.pass(answer),
        };
        if let Some(error) = answers.iter().find_map(Value::as_error) {
            return round.fail(error.as_bytes());
        }
        let sum: i64 = answers.iter().filter_map(Value::as_int).sum();
        match self.merge {
            Merge::Lines => {
                let texts: Vec<&[u8]> = answers.iter().filter_map(Value::as_bytes).collect();
                let text = texts.concat();
                round.done(|out, protocol| write::write_verbatim(out, protocol, *b"txt", &text))
            }
            Merge::Sum => round.done(|out, _| write::write_int(out, sum)),
            Merge::KilledOne if sum == 0 => round.fail(NO_SUCH_CLIENT),
            Merge::KilledOne | Merge::Ok => round.done(|out, _| write::write_simple(out, "OK")),
        }
    }
}

impl Core {
    /// CLIENT with a subcommand that is not answered in `local`.
    pub(super) fn client_command(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        let words: Vec<&[u8]> = (2..request.len()).map(|at| request.arg(at)).collect();
        match command.name {
            "client|list" => match Filter::of_list(&words) {
                Ok(_) => self.ask_peers(slot, b"list", &words, Merge::Lines),
                Err(text) => self.reply_error(slot, &text),
            },
            "client|kill" => self.client_kill(slot, &words),
            "client|unblock" => self.client_unblock(slot, &words),
            "client|pause" => self.client_pause(slot, &words),
            "client|unpause" => self.ask_peers(slot, b"pause", &[b"0", b"all"], Merge::Ok),
            "client|reply" => self.client_reply(slot, &words),
            "client|maint_notifications" => self.client_maint_notifications(slot, &words),
            "client|no-evict" | "client|no-touch" => self.client_flag(slot, command, &words),
            _ => self.unsupported(slot, command),
        }
    }

    fn ask_peers(&mut self, slot: u32, what: &[u8], words: &[&[u8]], merge: Merge) -> Flow {
        let client_id = self.sessions.get(slot).map_or(0, |c| c.state.id);
        let words = std::iter::once(&what).chain(words).map(|w| w.to_vec());
        let request = PeerRequest {
            client_id,
            words: words.collect(),
        };
        let job = AskPeers {
            request: Some(request),
            merge,
        };
        self.start_job(slot, Box::new(job))
    }

    fn client_kill(&mut self, slot: u32, words: &[&[u8]]) -> Flow {
        let filter = match Filter::of_kill(words) {
            Ok(filter) => filter,
            Err(text) => return self.reply_error(slot, &text),
        };
        if let Some(user) = filter.user()
            && !self.is_user(user)
        {
            let text = format!("ERR No such user '{}'", String::from_utf8_lossy(user));
            return self.reply_error(slot, text.as_bytes());
        }
        let merge = if filter.old_form {
            Merge::KilledOne
        } else {
            Merge::Sum
        };
        self.ask_peers(slot, b"kill", words, merge)
    }

    fn client_unblock(&mut self, slot: u32, words: &[&[u8]]) -> Flow {
        let reason = match words {
            [_] => &b"timeout"[..],
            [_, reason] => reason,
            _ => return self.reply_error(slot, SYNTAX),
        };
        if !(reason.eq_ignore_ascii_case(b"timeout") || reason.eq_ignore_ascii_case(b"error")) {
            let text = b"ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR";
            return self.reply_error(slot, text);
        }
        if parse_i64(words[0]).is_none() {
            return self.reply_error(slot, b"ERR value is not an integer or out of range");
        }
        self.ask_peers(slot, b"unblock", &[words[0], reason], Merge::Sum)
    }

    fn client_pause(&mut self, slot: u32, words: &[&[u8]]) -> Flow {
        let mode = match words {
            [_] => &b"all"[..],
            [_, mode] => mode,
            _ => return self.reply_error(slot, SYNTAX),
        };
        if !(mode.eq_ignore_ascii_case(b"all") || mode.eq_ignore_ascii_case(b"write")) {
            return self.reply_error(slot, b"ERR CLIENT PAUSE mode must be WRITE or ALL");
        }
        match parse_i64(words[0]) {
            None => self.reply_error(slot, b"ERR timeout is not an integer or out of range"),
            Some(ms) if ms < 0 => self.reply_error(slot, b"ERR timeout is negative"),
            Some(ms) if ms > PAUSE_MS_MAX => self.reply_error(slot, b"ERR timeout is out of range"),
            Some(_) => self.ask_peers(slot, b"pause", &[words[0], mode], Merge::Ok),
        }
    }

    /// CLIENT REPLY: OFF and SKIP themselves get no reply.
    fn client_reply(&mut self, slot: u32, words: &[&[u8]]) -> Flow {
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        match words
            .first()
            .map(|word| word.to_ascii_lowercase())
            .as_deref()
        {
            Some(b"on") => {
                client.set_muted(false);
                self.reply_simple(slot, "OK")
            }
            Some(b"off") => {
                client.set_muted(true);
                Flow::Taken
            }
            Some(b"skip") if client.is_muted() => Flow::Taken,
            Some(b"skip") => {
                client.set_muted(true);
                client.extra_mut().skips_reply = true;
                Flow::Taken
            }
            _ => self.reply_error(slot, SYNTAX),
        }
    }

    /// The command after CLIENT REPLY SKIP was taken: its reply goes nowhere, the next one's does.
    pub(super) fn skipped(&mut self, slot: u32) {
        if let Some(client) = self.sessions.get_mut(slot)
            && let Some(extra) = &mut client.extra
            && std::mem::take(&mut extra.skips_reply)
        {
            client.set_muted(false);
            client.tidy_extra();
        }
    }

    fn client_flag(&mut self, slot: u32, command: &Command, words: &[&[u8]]) -> Flow {
        let on = match words
            .first()
            .map(|word| word.to_ascii_lowercase())
            .as_deref()
        {
            Some(b"on") => true,
            Some(b"off") => false,
            _ => return self.reply_error(slot, SYNTAX),
        };
        if let Some(client) = self.sessions.get_mut(slot) {
            if command.name == "client|no-evict" {
                client.state.no_evict = on;
            } else {
                client.state.no_touch = on;
            }
        }
        self.reply_simple(slot, "OK")
    }

    /// A peer's question about this worker's clients.
    pub(super) fn peer_clients(&mut self, request: &PeerRequest) -> Option<Vec<u8>> {
        let words: Vec<&[u8]> = request.words.iter().map(Vec::as_slice).collect();
        let mut reply = Vec::new();
        match words[..] {
            [b"list", ref rest @ ..] => {
                let filter = Filter::of_list(rest).unwrap_or_default();
                let now_ms = self.now_unix_us / 1000;
                let mut lines = String::new();
                for client in self.sessions.iter().filter(|c| filter.matches(c, now_ms)) {
                    self.describe_client(client, &mut lines);
                }
                write::write_bulk(&mut reply, lines.as_bytes());
            }
            [b"kill", ref rest @ ..] => {
                let killed = match Filter::of_kill(rest) {
                    Ok(filter) => self.kill_matching(&filter, request.client_id),
                    Err(_) => 0,
                };
                write::write_int(&mut reply, killed);
            }
            [b"kill-users", ref users @ ..] => {
                let killed = users.iter().map(|user| self.kill_user(user)).sum();
                write::write_int(&mut reply, killed);
            }
            [b"unblock", id, reason] => {
                let how = if reason.eq_ignore_ascii_case(b"error") {
                    Unblock::Error
                } else {
                    Unblock::Timeout
                };
                let id = parse_i64(id).and_then(|id| u64::try_from(id).ok());
                let done = id.is_some_and(|id| self.unblock(id, how));
                write::write_int(&mut reply, i64::from(done));
            }
            [b"pause-left"] => {
                let (ms, writes_only) = self.pause_left();
                let ms = i64::try_from(ms).unwrap_or(i64::MAX);
                write::write_int(&mut reply, if writes_only { -ms } else { ms });
            }
            [b"pause", ms, mode] => {
                let ms = parse_i64(ms).unwrap_or(0);
                self.pause(ms.unsigned_abs(), mode.eq_ignore_ascii_case(b"write"));
                write::write_simple(&mut reply, "OK");
            }
            _ => return None,
        }
        Some(reply)
    }

    fn kill_matching(&mut self, filter: &Filter, asker: u64) -> i64 {
        let now_ms = self.now_unix_us / 1000;
        let meant =
            |c: &&Client| filter.matches(c, now_ms) && !(filter.skip_me && c.state.id == asker);
        let ids: Vec<u64> = self
            .sessions
            .iter()
            .filter(meant)
            .map(|c| c.state.id)
            .collect();
        ids.iter().for_each(|id| self.kill(*id, asker));
        ids.len() as i64
    }

    /// Closes the clients of a user that was changed or is gone.
    fn kill_user(&mut self, user: &[u8]) -> i64 {
        let of_user = |c: &&Client| c.state.authenticated && c.state.user().as_bytes() == user;
        let ids: Vec<u64> = self
            .sessions
            .iter()
            .filter(of_user)
            .map(|c| c.state.id)
            .collect();
        ids.iter().for_each(|id| self.kill(*id, 0));
        ids.len() as i64
    }

    /// Closes a client; the one that asks for it only after it has its reply.
    fn kill(&mut self, id: u64, asker: u64) {
        if let Some(slot) = self.sessions.slot_of(id) {
            if id == asker {
                self.sessions.leave(slot);
            } else {
                self.sessions.doom(slot, CloseReason::Killed);
            }
        }
    }

    /// The line of CLIENT LIST and CLIENT INFO.
    pub(super) fn describe_client(&self, client: &Client, out: &mut String) {
        let state = &client.state;
        let names = state.names.as_deref().cloned().unwrap_or_default();
        let shown = |address: Option<std::net::SocketAddr>| {
            address.map(|a| a.to_string()).unwrap_or_default()
        };
        let now_ms = self.now_unix_us / 1000;
        let transaction = state.transaction.as_ref();
        let (sub, psub, ssub) = client.subscriptions();
        let (obl, omem) = (client.unsent(), client.backlog());
        let qbuf = state.input.len().max(usize::from(client.last_bytes));
        let _ = writeln!(
            out,
            "id={} addr={} laddr={} fd={} name={} age={} idle={} flags={} db={} sub={sub} \
             psub={psub} ssub={ssub} multi={} qbuf={qbuf} qbuf-free={} argv-mem={} multi-mem={} \
             rbs=0 rbp=0 obl={obl} oll=0 omem={omem} tot-mem={} events=r cmd={} user={} \
             redir={} resp={} lib-name={} lib-ver={}",
            state.id,
            shown(state.peer),
            shown(client.local),
            state.id, // descriptors are nobody's business; unique is enough
            String::from_utf8_lossy(&names.name),
            now_ms.saturating_sub(state.connected_unix_ms) / 1000,
            self.now_us.saturating_sub(client.heard_us) / 1_000_000,
            flags_of(client),
            state.db,
            transaction.map_or(-1, |t| i64::from(t.commands)),
            state.input.capacity() - state.input.len(),
            client.last_bytes,
            transaction.map_or(0, |t| t.frames.len()),
            state.input.capacity() + state.output.capacity() + size_of::<Client>(),
            client.last_command.map_or("NULL", |command| command.name),
            state.user(),
            client.redirection(),
            if state.protocol == Protocol::Resp3 {
                3
            } else {
                2
            },
            String::from_utf8_lossy(&names.library_name),
            String::from_utf8_lossy(&names.library_version),
        );
    }
}

/// The letters of Redis for what a client is and does; `N` for none.
fn flags_of(client: &Client) -> String {
    let mut flags = String::new();
    let state = &client.state;
    for (letter, set) in [
        ('O', client.is_monitoring()),
        ('P', client.is_subscriber()),
        ('x', state.transaction.is_some()),
        ('b', client.pause == super::client::Pause::Blocked),
        ('t', client.is_tracking()),
        ('e', state.no_evict),
        ('T', state.no_touch),
    ] {
        if set {
            flags.push(letter);
        }
    }
    if flags.is_empty() {
        flags.push('N');
    }
    flags
}
