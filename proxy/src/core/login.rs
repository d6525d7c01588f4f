//! AUTH, HELLO and RESET: who a client is and which protocol it speaks.
//!
//! Invariant: a client changes its protocol only while nothing of it is in flight, because the
//! versions use different lanes and its order must hold.

use std::sync::Arc;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::dispatch::{Flow, NOT_READY};
use super::spec::Request;

/// What clients are told they talk to; the newest commands of the table are those of this version.
pub(super) const SERVER_VERSION: &str = "7.4.0";
const WRONG_PASS: &[u8] = b"WRONGPASS invalid username-password pair or user is disabled.";
const NO_PASSWORD_SET: &[u8] = b"ERR AUTH <password> called without any password configured for \
    the default user. Are you sure your configuration is correct?";
const HELLO_NO_AUTH: &[u8] = b"NOAUTH HELLO must be called with the client already authenticated, \
    otherwise the HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client \
    and select the RESP protocol version at the same time";

impl Core {
    pub(super) fn auth(&mut self, slot: u32, request: Request<'_>) -> Flow {
        if !self.ready {
            return self.reply_error(slot, NOT_READY.as_bytes());
        }
        let (user, password): (&[u8], &[u8]) = match request.len() {
            2 => (b"default", request.arg(1)),
            3 => (request.arg(1), request.arg(2)),
            _ => return self.reply_error(slot, b"ERR syntax error"),
        };
        let mut found = self.users().authenticate(user, password).cloned();
        let mut open = false;
        if request.len() == 2 {
            open = self.users().default_user().is_nopass();
            let named = memchr::memchr(b':', password);
            if let Some(colon) = named.filter(|_| open || found.is_none()) {
                // One word for both, for clients that know nothing of users.
                let (user, password) = (&password[..colon], &password[colon + 1..]);
                found = self.users().authenticate(user, password).cloned();
            } else if open {
                found = None;
            }
        }
        match found {
            Some(user) => {
                self.log_in(slot, &user);
                self.reply_simple(slot, "OK")
            }
            None if open => self.reply_error(slot, NO_PASSWORD_SET),
            None => {
                self.log_refused_login(slot, request.arg(0), user);
                self.reply_error(slot, WRONG_PASS)
            }
        }
    }

    pub(super) fn hello(&mut self, slot: u32, request: Request<'_>) -> Flow {
        if !self.ready {
            return self.reply_error(slot, NOT_READY.as_bytes());
        }
        let Some(client) = self.sessions.get(slot) else {
            return Flow::Taken;
        };
        let (current, authenticated) = (client.state.protocol, client.state.authenticated);
        let in_flight = client.in_flight();
        let protocol = match (request.len(), request.arg(1)) {
            (1, _) => current,
            (_, b"2") => Protocol::Resp2,
            (_, b"3") => Protocol::Resp3,
            (_, version) if slotmesh_resp::parse_i64(version).is_none() => {
                let text = b"ERR Protocol version is not an integer or out of range";
                return self.reply_error(slot, text);
            }
            _ => return self.reply_error(slot, b"NOPROTO unsupported protocol version"),
        };
        if protocol != current && in_flight > 0 {
            return Flow::NotYet;
        }
        let (mut at, mut login, mut name) = (2, None, None);
        while at < request.len() {
            if request.is(at, "auth") && at + 2 < request.len() {
                login = Some((request.arg(at + 1), request.arg(at + 2)));
                at += 3;
            } else if request.is(at, "setname") && at + 1 < request.len() {
                name = Some(request.arg(at + 1));
                at += 2;
            } else {
                let option = String::from_utf8_lossy(request.arg(at));
                let text = format!("ERR Syntax error in HELLO option '{option}'");
                return self.reply_error(slot, text.as_bytes());
            }
        }
        match login {
            Some((name, password)) => {
                let Some(user) = self.users().authenticate(name, password).cloned() else {
                    self.log_refused_login(slot, request.arg(0), name);
                    return self.reply_error(slot, WRONG_PASS);
                };
                self.log_in(slot, &user);
            }
            None if !authenticated => return self.reply_error(slot, HELLO_NO_AUTH),
            None => {}
        }
        if let Some(name) = name
            && let Err(text) = self.set_name(slot, name)
        {
            return self.reply_error(slot, text);
        }
        if let Some(flow) = self.wait_for_version(slot) {
            return flow;
        }
        self.greet(slot, protocol)
    }

    fn greet(&mut self, slot: u32, protocol: Protocol) -> Flow {
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        client.set_protocol(protocol);
        let id = client.state.id;
        self.speak_on_own_lane(slot, protocol);
        let version = self.server_version().to_owned();
        self.reply_with(slot, |out| {
            let text = |out: &mut Vec<u8>, key: &str, value: &str| {
                write::write_bulk(out, key.as_bytes());
                write::write_bulk(out, value.as_bytes());
            };
            write::write_map_header(out, protocol, 7);
            text(out, "server", "redis");
            text(out, "version", &version);
            write::write_bulk(out, b"proto");
            write::write_int(out, if protocol == Protocol::Resp3 { 3 } else { 2 });
            write::write_bulk(out, b"id");
            write::write_int(out, id as i64);
            text(out, "mode", "standalone");
            text(out, "role", "master");
            write::write_bulk(out, b"modules");
            write::write_array_header(out, 0);
        })
    }

    /// RESET: as if the client had just connected, but for its id.
    pub(super) fn reset(&mut self, slot: u32) -> Flow {
        let open = self.is_open();
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        if client.state.protocol == Protocol::Resp3 && client.in_flight() > 0 {
            return Flow::NotYet;
        }
        self.leave_topics(slot);
        self.end_monitoring(slot);
        self.end_tracking(slot);
        self.release_watch(slot);
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        client.state.transaction = None;
        client.state.db = 0;
        client.set_protocol(Protocol::Resp2);
        client.log_out();
        if let Some(names) = &mut client.state.names {
            names.name.clear();
        }
        client.set_muted(false);
        if open {
            let user = Arc::clone(self.users().default_user());
            self.log_in(slot, &user);
        }
        self.reply_simple(slot, "RESET")
    }
}
