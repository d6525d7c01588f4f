//! Commands of proxies at a node: the engine's own order of refusing, then the data.
//!
//! Invariant: a command is refused before any of it is executed, or executed whole.

use super::Node;
use crate::{
    ctx::Ctx,
    msg::{ConnId, Stream},
    redis::{Client, Kind, Op, Process, Rights},
    resp,
    sched::MS,
};

const READONLY: &str = "-READONLY You can't write against a read only replica.\r\n";

impl Node {
    /// Executes what a connection has sent, as far as nothing pauses it.
    pub(super) fn serve(&mut self, ctx: &mut Ctx, p: &mut Process, conn: ConnId) {
        let Some(mut client) = p.clients.remove(&conn) else {
            return;
        };
        let input = std::mem::take(&mut client.input);
        let (mut at, mut out) = (0, Vec::new());
        while let Some((args, used)) = resp::command(&input[at..]) {
            // Whoever waits for replicas is not read from.
            if client.waits.is_some() {
                break;
            }
            match self.execute(ctx, p, &mut client, &args) {
                Some(reply) => out.extend_from_slice(reply.as_bytes()),
                None => break,
            }
            at += used;
        }
        client.input = input[at..].to_vec();
        p.clients.insert(conn, client);
        if !out.is_empty() {
            ctx.send(self.party(), conn, Stream::Bytes(out));
        }
    }

    /// One command; `None`: writes are paused.
    fn execute(
        &mut self,
        ctx: &mut Ctx,
        p: &mut Process,
        client: &mut Client,
        args: &[&str],
    ) -> Option<String> {
        let name = args[0].to_ascii_uppercase();
        if name == "AUTH" {
            let ok = p.admits(args[1], args[2], false);
            if ok {
                args[1].clone_into(&mut client.user);
            }
            return Some(
                if ok {
                    "+OK\r\n"
                } else {
                    "-WRONGPASS invalid\r\n"
                }
                .into(),
            );
        }
        let Some(user) = p.users.get(&client.user) else {
            return Some("-NOAUTH Authentication required.\r\n".into());
        };
        let reads = matches!(name.as_str(), "GET" | "SELECT" | "WAIT");
        if user.rights != Rights::Full && !reads {
            let name = name.to_ascii_lowercase();
            return Some(format!(
                "-NOPERM User x has no permissions to run the '{name}' command\r\n"
            ));
        }
        if p.loading_until > ctx.now() {
            return Some("-LOADING Redis is loading the dataset in memory\r\n".into());
        }
        if client.multi.is_some() && name != "EXEC" {
            return Some(match write_of(&name, args) {
                Some(op) if p.is_primary() => {
                    client.multi.get_or_insert_default().push(op);
                    "+QUEUED\r\n".into()
                }
                _ => {
                    client.dirty = true;
                    READONLY.into()
                }
            });
        }
        self.run(ctx, p, client, &name, args)
    }

    /// A command that was not refused; `None`: writes are paused.
    fn run(
        &mut self,
        ctx: &mut Ctx,
        p: &mut Process,
        client: &mut Client,
        name: &str,
        args: &[&str],
    ) -> Option<String> {
        match name {
            "SELECT" => Some("+OK\r\n".into()),
            "WAIT" => Some(self.wait(ctx, p, client, args)),
            "GET" => {
                let value = resp::key(args[1]).and_then(|key| p.last.get(&key));
                Some(value.map_or("$-1\r\n".into(), |v| resp::bulk(&v.to_string())))
            }
            "MULTI" => {
                client.multi = Some(Vec::new());
                Some("+OK\r\n".into())
            }
            "EXEC" => {
                if p.failover.is_some() {
                    return None;
                }
                let ops = client.multi.take().unwrap_or_default();
                if std::mem::take(&mut client.dirty) {
                    return Some(
                        "-EXECABORT Transaction discarded because of previous errors.\r\n".into(),
                    );
                }
                if !p.is_primary() {
                    return Some(READONLY.into());
                }
                let replies: String = ops
                    .iter()
                    .map(|op| self.write(ctx, p, &client.user, *op))
                    .collect();
                client.wrote = p.offset();
                Some(format!("*{}\r\n{replies}", ops.len()))
            }
            _ => {
                let Some(op) = write_of(name, args) else {
                    return Some("-ERR unknown command\r\n".into());
                };
                if p.failover.is_some() {
                    return None;
                }
                if !p.is_primary() {
                    return Some(READONLY.into());
                }
                let reply = self.write(ctx, p, &client.user, op);
                client.wrote = p.offset();
                Some(reply)
            }
        }
    }

    /// WAIT: answered at once if enough replicas have it, else later; they are asked how far they
    /// are, in the stream, as the engine does.
    fn wait(
        &mut self,
        ctx: &mut Ctx,
        p: &mut Process,
        client: &mut Client,
        args: &[&str],
    ) -> String {
        let number = |at: usize| args.get(at).and_then(|a| a.parse::<u64>().ok());
        let (Some(count), Some(ms)) = (number(1), number(2)) else {
            return "-ERR value is not an integer or out of range\r\n".into();
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let have = p.acknowledged(client.wrote);
        ctx.say(|| format!("{}: WAIT {count}: {have} have {}", self.name, client.wrote));
        if have >= count || !p.is_primary() {
            return format!(":{have}\r\n");
        }
        client.waits = Some((count, ctx.now() + ms * MS));
        let id = ctx.call();
        let ask = Op {
            id,
            key: 0,
            kind: Kind::GetAck,
        };
        self.append(ctx, p, &[ask]);
        String::new()
    }

    /// Answers those whose WAIT is over.
    pub(super) fn unblock(&mut self, ctx: &mut Ctx, p: &mut Process) {
        let now = ctx.now();
        let due: Vec<(ConnId, usize)> = (p.clients.iter())
            .filter_map(|(conn, client)| {
                let (count, until) = client.waits?;
                let have = p.acknowledged(client.wrote);
                (have >= count || until <= now).then_some((*conn, have))
            })
            .collect();
        for (conn, have) in due {
            if let Some(client) = p.clients.get_mut(&conn) {
                client.waits = None;
            }
            let reply = format!(":{have}\r\n").into_bytes();
            ctx.send(self.party(), conn, Stream::Bytes(reply));
            self.serve(ctx, p, conn);
        }
    }

    fn write(&mut self, ctx: &mut Ctx, p: &mut Process, user: &str, op: Op) -> String {
        let unwatched = ctx.checks.is_unwatched(self.host, ctx.now());
        let late = ctx.is_asleep(self.party()) || unwatched;
        let process = (self.name.as_str(), p.run_id.as_str());
        ctx.checks.wrote(self.shard, process, user, op.id, late);
        p.led = true;
        self.append(ctx, p, &[op]);
        match op.kind {
            Kind::Push => format!(":{}\r\n", p.lengths.get(&op.key).copied().unwrap_or(0)),
            _ => "+OK\r\n".into(),
        }
    }
}

fn write_of(name: &str, args: &[&str]) -> Option<Op> {
    let kind = match name {
        "SET" => Kind::Set,
        "RPUSH" => Kind::Push,
        _ => return None,
    };
    let (key, id) = (resp::key(args.get(1)?)?, args.get(2)?.parse().ok()?);
    Some(Op { id, key, kind })
}
