//! What operators ask for that is made of other tasks' steps: another engine for all nodes, and a host
//! without primaries.
//!
//! Invariant: what is admitted is what the real rules admit, from what this controller sees.

use slotmesh_task::{
    Choice, Spec, Task, drain,
    upgrade::{self, Method, Options},
};
use slotmesh_topology::{HostId, Shard, TaskId, artifact::parse_name};

use super::write::{Writer, new_task, switch_to};
use crate::{
    engine,
    store::{Compare, Key, StoreReply, StoreRequest, Value},
};

/// Longer than any run: its phases have their own deadlines.
const UPGRADE_MS_MAX: u64 = 3_600_000;

/// What a number chooses of an upgrade; with room on other hosts new nodes take the places of the old.
fn options(choice: u64, has_room: bool) -> Options {
    let name = match choice % 4 {
        0 => engine::PATCH,
        _ => engine::NEXT,
    };
    let to = parse_name(name).unwrap_or_else(|| unreachable!("engines have names"));
    Options {
        to,
        bake_ms: choice / 4 % 25 * 100,
        canary_shards: u32::from((choice / 100).is_multiple_of(2)),
        parallel_shards: 1 + u32::from((choice / 200).is_multiple_of(2)),
        finalize_by_operator: choice / 400 % 8 == 1,
        preserve_roles: choice / 3_200 % 3 == 1 && !has_room,
        in_window: false,
        automatic: false,
        allow_downtime: true,
        method: match has_room {
            true => Method::CrossHost,
            false => Method::InPlace,
        },
        // How long virtual holds are is not what is simulated here.
        max_hold_ms: 0,
    }
}

/// Every node is to run another engine.
pub(super) async fn upgrade(writer: &Writer, choice: u64, token: u64) {
    let desk = &writer.desk;
    let idem = Key::Idem(token.to_string());
    let known = desk.store(StoreRequest::Get(idem.clone())).await;
    if !matches!(known, Some(StoreReply::Got(None))) {
        return;
    }
    let planned = {
        let (mirror, fleet) = (desk.mirror.borrow(), desk.fleet.borrow());
        let is_open =
            |t: &Task| matches!(t.spec, Spec::Upgrade(_)) && (!t.state.is_ended() || t.is_parked());
        if mirror.is_deleting || mirror.tasks.values().any(|t| is_open(&t.value)) {
            return;
        }
        let shards: Vec<Shard> = mirror.shards.values().map(|s| s.value.clone()).collect();
        let instance = mirror.instance(&desk.instance);
        let nodes = instance.replicas_per_shard as usize + 1;
        let options = options(choice, fleet.hosts.len() >= 2 * nodes.max(2));
        upgrade::plan(&instance, &shards, &fleet, &options, desk.now_ms())
    };
    let planned = match planned {
        Ok(planned) if planned.nothing_to_do => return,
        Ok(planned) => planned,
        Err(why) => return desk.world.borrow_mut().say(|| format!("refused: {why}")),
    };
    let id = format!("u{token}");
    {
        let mut ctx = desk.world.borrow_mut();
        ctx.say(|| format!("task {id}: {:?}", planned.upgrade));
        ctx.checks.upgrades += 1;
    }
    let mut txn = writer.leader_txn();
    txn.compares.push(Compare::Absent(idem.clone()));
    txn.compares.push(Compare::Absent(Key::Instance));
    txn.puts.push((idem, Value::Idem(id.clone())));
    let task = new_task(&id, Spec::Upgrade(planned.upgrade), desk, UPGRADE_MS_MAX);
    writer.new_task(&mut txn, &task);
    // Whoever asked asks again when there is no answer.
    let _ = writer.commit(txn).await;
}

/// The primaries of a host move away, as far as they can now.
pub(super) async fn drain(writer: &Writer, host: usize, token: u64) {
    let desk = &writer.desk;
    let host: HostId = format!("h{host}").into();
    let moves = {
        let (mirror, fleet) = (desk.mirror.borrow(), desk.fleet.borrow());
        let task_of = |shard: &Shard| {
            let owner = mirror.owners.get(&(shard.index as usize));
            owner.map(|(task, _)| TaskId::from(task.as_str()))
        };
        let answers = |host: &HostId| fleet.hosts.contains(host);
        let shards = mirror.shards.values().map(|s| &s.value);
        drain::drain(shards, &host, task_of, answers).moves
    };
    for names in moves.into_values() {
        let names = names.iter().map(ToString::to_string).collect();
        switch_to(writer, names, token).await;
    }
}

/// What an operator says to an upgrade that has it on its menu.
pub(super) fn told(task: &Task, choice: Choice, now_ms: u64) -> Option<Task> {
    let is_asked = matches!(task.spec, Spec::Upgrade(_)) && upgrade::menu(task).contains(&choice);
    is_asked.then(|| upgrade::resolved(task, choice, now_ms))
}
