//! Commands that the proxy answers out of its own knowledge.
//!
//! Invariant: nothing here names a node, and what a client sets is seen by that client alone.
//! `CLIENT LIST` shows the clients of the worker that the asking client is on.

use slotmesh_command::Command;
use slotmesh_resp::{Protocol, parse_i64, write};

use super::Core;
use super::dispatch::Flow;
use super::spec::Request;

impl Core {
    pub(super) fn local(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        match command.name {
            "ping" => self.ping(slot, request),
            "echo" => self.reply_with(slot, |out| write::write_bulk(out, request.arg(1))),
            "quit" => {
                self.reply_simple(slot, "OK");
                self.client_hung_up(slot);
                Flow::Taken
            }
            "reset" => self.reset(slot),
            "auth" => self.auth(slot, request),
            "hello" => self.hello(slot, request),
            "select" => self.select(slot, request),
            "readonly" | "readwrite" => self.reply_simple(slot, "OK"),
            "time" => self.time(slot),
            "info" => self.info(slot, request),
            "client|tracking" => self.client_tracking(slot, request),
            "client|caching" => self.client_caching(slot, request),
            "client|trackinginfo" => self.client_tracking_info(slot),
            "client|getredir" => self.client_get_redirection(slot),
            "client|id" => {
                let id = self.sessions.get(slot).map_or(0, |c| c.state.id);
                self.reply_with(slot, |out| write::write_int(out, id as i64))
            }
            "client|setname" => match self.set_name(slot, request.arg(1 + 1)) {
                Ok(()) => self.reply_simple(slot, "OK"),
                Err(text) => self.reply_error(slot, text),
            },
            "client|getname" => self.get_name(slot),
            "client|setinfo" => self.set_info(slot, request),
            "client|info" => self.client_info(slot),
            // The engine knows its commands best.
            "lolwut" | "command" => self.send_to_owner(slot, command, request),
            name if name.starts_with("command|") => self.send_to_owner(slot, command, request),
            "role" => self.role(slot),
            "asking" => self.reply_simple(slot, "OK"),
            name if name.starts_with("cluster|") => self.cluster_command(slot, command, request),
            name if name.starts_with("acl|") => self.acl_command(slot, command, request),
            name if name.starts_with("client|") => self.client_command(slot, command, request),
            name if name.starts_with("config") => self.config(slot, command, request),
            _ => self.unsupported(slot, command),
        }
    }

    pub(super) fn protocol(&self, slot: u32) -> Protocol {
        self.sessions
            .get(slot)
            .map_or(Protocol::Resp2, |c| c.state.protocol)
    }

    fn ping(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let client = self.sessions.get(slot);
        if client.is_some_and(|c| c.is_subscriber() && c.state.protocol == Protocol::Resp2)
            && request.len() <= 2
        {
            return self.pong_to_subscriber(slot, request);
        }
        match request.len() {
            1 => self.reply_simple(slot, "PONG"),
            2 => self.reply_with(slot, |out| write::write_bulk(out, request.arg(1))),
            _ => self.refuse(slot, b"ERR wrong number of arguments for 'ping' command"),
        }
    }

    /// The database that SELECT names.
    pub(super) fn database_of(&self, word: &[u8]) -> Result<u16, &'static str> {
        match parse_i64(word) {
            None => Err("ERR value is not an integer or out of range"),
            Some(db) if i32::try_from(db).is_err() => {
                Err("ERR value is out of range, value must between -2147483648 and 2147483647")
            }
            Some(db) if !(0..i64::from(self.table.settings.databases)).contains(&db) => {
                Err("ERR DB index is out of range")
            }
            Some(db) => Ok(db as u16),
        }
    }

    fn select(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let db = match self.database_of(request.arg(1)) {
            Ok(db) => db,
            Err(text) => return self.reply_error(slot, text.as_bytes()),
        };
        if let Some(client) = self.sessions.get_mut(slot) {
            client.state.db = db;
        }
        self.reply_simple(slot, "OK")
    }

    fn time(&mut self, slot: u32) -> Flow {
        let (seconds, micros) = (self.now_unix_us / 1_000_000, self.now_unix_us % 1_000_000);
        self.reply_with(slot, |out| {
            write::write_array_header(out, 2);
            write::write_bulk(out, seconds.to_string().as_bytes());
            write::write_bulk(out, micros.to_string().as_bytes());
        })
    }

    pub(super) fn set_name(&mut self, slot: u32, name: &[u8]) -> Result<(), &'static [u8]> {
        if !is_printable(name) {
            return Err(b"ERR Client names cannot contain spaces, newlines or special characters.");
        }
        if let Some(client) = self.sessions.get_mut(slot) {
            client.state.names_mut().name = name.to_vec();
        }
        Ok(())
    }

    fn get_name(&mut self, slot: u32) -> Flow {
        let protocol = self.protocol(slot);
        let names = self.sessions.get(slot).and_then(|c| c.state.names.clone());
        self.reply_with(slot, |out| match names {
            Some(names) if !names.name.is_empty() => write::write_bulk(out, &names.name),
            _ => write::write_null(out, protocol),
        })
    }

    fn set_info(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let value = request.arg(3);
        let option = String::from_utf8_lossy(request.arg(2)).into_owned();
        if !is_printable(value) {
            let text = format!(
                "ERR {} cannot contain spaces, newlines or special characters.",
                option.to_ascii_lowercase()
            );
            return self.reply_error(slot, text.as_bytes());
        }
        let Some(client) = self.sessions.get_mut(slot) else {
            return Flow::Taken;
        };
        if request.is(2, "lib-name") {
            client.state.names_mut().library_name = value.to_vec();
        } else if request.is(2, "lib-ver") {
            client.state.names_mut().library_version = value.to_vec();
        } else {
            let text = format!("ERR Unrecognized option '{option}'");
            return self.reply_error(slot, text.as_bytes());
        }
        self.reply_simple(slot, "OK")
    }

    fn client_info(&mut self, slot: u32) -> Flow {
        let protocol = self.protocol(slot);
        let mut line = String::new();
        if let Some(client) = self.sessions.get(slot) {
            self.describe_client(client, &mut line);
        }
        self.reply_with(slot, |out| {
            write::write_verbatim(out, protocol, *b"txt", line.as_bytes());
        })
    }

    /// ROLE: to a client the instance is one primary.
    fn role(&mut self, slot: u32) -> Flow {
        self.reply_with(slot, |out| {
            write::write_array_header(out, 3);
            write::write_bulk(out, b"master");
            write::write_int(out, 0);
            write::write_array_header(out, 0);
        })
    }
}

fn is_printable(text: &[u8]) -> bool {
    text.iter().all(|b| (b'!'..=b'~').contains(b))
}
