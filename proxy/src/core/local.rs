//! Commands that the proxy answers out of its own knowledge.
//!
//! Invariant: nothing here names a node, and what a client sets is seen by that client alone.
//! `CLIENT LIST` shows the clients of the worker that the asking client is on.

use std::fmt::Write as _;

use slotmesh_command::Command;
use slotmesh_resp::{Protocol, parse_i64, write};
use slotmesh_topology::Slot;

use super::Core;
use super::client::Client;
use super::dispatch::Flow;
use super::login::SERVER_VERSION;
use super::spec::Request;

const NOT_AN_INTEGER: &[u8] = b"ERR value is not an integer or out of range";

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
            "info" => self.info(slot),
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
            "client|list" => self.client_list(slot),
            "command" | "command|count" | "command|docs" | "command|info" | "command|list" => {
                self.describe(slot, command, request)
            }
            "cluster|keyslot" => {
                let number = i64::from(Slot::of(request.arg(2)).number());
                self.reply_with(slot, |out| write::write_int(out, number))
            }
            "acl|whoami" => self.reply_with(slot, |out| write::write_bulk(out, b"default")),
            _ => self.unsupported(slot, command),
        }
    }

    fn protocol(&self, slot: u32) -> Protocol {
        self.sessions
            .get(slot)
            .map_or(Protocol::Resp2, |c| c.state.protocol)
    }

    fn ping(&mut self, slot: u32, request: Request<'_>) -> Flow {
        match request.len() {
            1 => self.reply_simple(slot, "PONG"),
            2 => self.reply_with(slot, |out| write::write_bulk(out, request.arg(1))),
            _ => self.refuse(slot, b"ERR wrong number of arguments for 'ping' command"),
        }
    }

    fn select(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let databases = i64::from(self.table.settings.databases);
        let db = match parse_i64(request.arg(1)) {
            None => return self.reply_error(slot, NOT_AN_INTEGER),
            Some(db) if i32::try_from(db).is_err() => {
                let text =
                    b"ERR value is out of range, value must between -2147483648 and 2147483647";
                return self.reply_error(slot, text);
            }
            Some(db) if !(0..databases).contains(&db) => {
                return self.reply_error(slot, b"ERR DB index is out of range");
            }
            Some(db) => db as u16,
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

    fn info(&mut self, slot: u32) -> Flow {
        let protocol = self.protocol(slot);
        let identity = &self.identity;
        let mut text = String::new();
        let _ = write!(
            text,
            "# Server\r\nredis_version:{SERVER_VERSION}\r\nredis_mode:standalone\r\n\
             os:Linux\r\nprocess_id:{}\r\nrun_id:{}\r\ntcp_port:{}\r\n\r\n\
             # Clients\r\nconnected_clients:{}\r\n\r\n# Replication\r\nrole:master\r\n",
            identity.pid,
            identity.run_id,
            identity.port,
            self.sessions.len(),
        );
        self.reply_with(slot, |out| {
            write::write_verbatim(out, protocol, *b"txt", text.as_bytes());
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
        let now_ms = self.now_unix_us / 1000;
        let line = self
            .sessions
            .get(slot)
            .map(|c| describe_client(c, now_ms))
            .unwrap_or_default();
        self.reply_with(slot, |out| {
            write::write_verbatim(out, protocol, *b"txt", line.as_bytes());
        })
    }

    fn client_list(&mut self, slot: u32) -> Flow {
        let protocol = self.protocol(slot);
        let now_ms = self.now_unix_us / 1000;
        let lines: String = self
            .sessions
            .iter()
            .map(|c| describe_client(c, now_ms))
            .collect();
        self.reply_with(slot, |out| {
            write::write_verbatim(out, protocol, *b"txt", lines.as_bytes());
        })
    }

    /// What redis-benchmark and client libraries ask for at their start; nodes' settings are not a
    /// client's business.
    pub(super) fn config_get(&mut self, slot: u32, request: Request<'_>) -> Flow {
        let protocol = self.protocol(slot);
        let databases = self.table.settings.databases.to_string();
        let known = [
            ("save", ""),
            ("appendonly", "yes"),
            ("databases", databases.as_str()),
        ];
        let asked = |name: &str| (2..request.len()).any(|at| request.is(at, name));
        let found: Vec<_> = known.into_iter().filter(|(name, _)| asked(name)).collect();
        self.reply_with(slot, |out| {
            write::write_map_header(out, protocol, found.len());
            for (name, value) in found {
                write::write_bulk(out, name.as_bytes());
                write::write_bulk(out, value.as_bytes());
            }
        })
    }

    /// COMMAND: names, arities and key positions of the table.
    fn describe(&mut self, slot: u32, command: &Command, request: Request<'_>) -> Flow {
        let protocol = self.protocol(slot);
        let top = || slotmesh_command::all().filter(|c| !c.name.contains('|'));
        self.reply_with(slot, |out| match command.name {
            "command|count" => write::write_int(out, top().count() as i64),
            "command|docs" => write::write_map_header(out, protocol, 0),
            "command|list" => {
                write::write_array_header(out, top().count());
                top().for_each(|c| write::write_bulk(out, c.name.as_bytes()));
            }
            "command|info" if request.len() > 2 => {
                write::write_array_header(out, request.len() - 2);
                for at in 2..request.len() {
                    match slotmesh_command::lookup(request.arg(at)) {
                        Some(command) => write_command(out, command),
                        None => write::write_null_array(out, protocol),
                    }
                }
            }
            _ => {
                write::write_array_header(out, top().count());
                top().for_each(|c| write_command(out, c));
            }
        })
    }
}

/// The six fields that every client library understands.
fn write_command(out: &mut Vec<u8>, command: &Command) {
    use slotmesh_command::Flag;
    let flags: Vec<&str> = [
        (Flag::Write, "write"),
        (Flag::ReadOnly, "readonly"),
        (Flag::Fast, "fast"),
        (Flag::Blocking, "blocking"),
        (Flag::MovableKeys, "movablekeys"),
    ]
    .into_iter()
    .filter_map(|(flag, name)| command.flags.has(flag).then_some(name))
    .collect();
    let key = command.only_key().map_or(0, |k| k as i64);
    write::write_array_header(out, 6);
    write::write_bulk(out, command.name.as_bytes());
    write::write_int(out, i64::from(command.arity));
    write::write_array_header(out, flags.len());
    flags.iter().for_each(|flag| write::write_simple(out, flag));
    write::write_int(out, key);
    write::write_int(out, key);
    write::write_int(out, i64::from(key > 0));
}

fn is_printable(text: &[u8]) -> bool {
    text.iter().all(|b| (b'!'..=b'~').contains(b))
}

/// One line of CLIENT LIST.
fn describe_client(client: &Client, now_ms: u64) -> String {
    let state = &client.state;
    let names = state.names.as_deref().cloned().unwrap_or_default();
    let peer = state.peer.map(|p| p.to_string()).unwrap_or_default();
    let age = now_ms.saturating_sub(state.connected_unix_ms) / 1000;
    let multi = state
        .transaction
        .as_ref()
        .map_or(-1, |t| i64::from(t.commands));
    let resp = if state.protocol == Protocol::Resp3 {
        3
    } else {
        2
    };
    format!(
        "id={} addr={peer} laddr= fd=0 name={} age={age} idle=0 flags=N db={} sub=0 psub=0 ssub=0 \
         multi={multi} qbuf={} obl={} oll=0 events=r cmd=client user=default redir=-1 resp={resp} \
         lib-name={} lib-ver={}\n",
        state.id,
        String::from_utf8_lossy(&names.name),
        state.db,
        state.input.len(),
        client.unsent(),
        String::from_utf8_lossy(&names.library_name),
        String::from_utf8_lossy(&names.library_version),
    )
}
