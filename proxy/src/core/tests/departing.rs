//! Clients that are to go elsewhere: who is told, who is closed when, and who is not.

use std::net::SocketAddr;

use super::world::{World, command};
use crate::core::client::Pause;
use crate::core::departing::{Departure, Elsewhere};
use crate::core::sessions::{DIRECT_BYTES, Outlet};

const SECOND: u64 = 1_000_000;

fn departure(elsewhere: Elsewhere, within_us: u64, world: &World) -> Departure {
    Departure {
        elsewhere,
        number: 7,
        deadline_us: world.now_us + within_us,
    }
}

fn at(address: &str) -> Elsewhere {
    Elsewhere::At(address.to_owned())
}

/// Time passes in steps, and a worker closes whom it may, until it is over or this client has parted.
/// When that was.
fn parts(world: &mut World, slot: u32, within_us: u64) -> Option<u64> {
    let began_us = world.now_us;
    while world.now_us < began_us + within_us {
        step(world);
        let client = world.core.sessions.get(slot);
        if client.is_none_or(|client| client.pause == Pause::Leaving) {
            return Some(world.now_us - began_us);
        }
    }
    None
}

/// As a worker does it after its sends. Who was closed by force is gone.
fn step(world: &mut World) {
    world.pass(10_000);
    for (slot, generation) in std::mem::take(&mut world.core.out.partings) {
        if world.core.may_part(slot, generation) {
            world.core.parted(slot, generation);
        }
    }
    for (slot, _, _) in std::mem::take(&mut world.core.sessions.doomed) {
        world.core.close_client(slot);
    }
}

fn ask(world: &mut World, slot: u32, line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    world.send(slot, &command(&words));
    world.settle();
    world.take_replies(slot)
}

#[test]
fn who_has_not_been_sent_what_is_sealed_is_neither_done_nor_idle_nor_between_requests() {
    let mut world = World::new(1);
    world.set_settings(|settings| settings.parameters.timeout_s = 1);
    let slot = world.connect();
    assert_eq!(ask(&mut world, slot, "GET k"), "$-1\r\n");
    let client = world.core.sessions.get_mut(slot).unwrap();
    client.sealed = true;
    let generation = client.generation;
    (0..3).for_each(|_| world.pass(2 * SECOND));
    assert!(!world.core.may_part(slot, generation));
    world.core.client_hung_up(slot);
    assert!(!world.core.sessions.is_done(slot));
    assert!(world.core.sessions.doomed.is_empty(), "the tail of a reply");
    world.core.sessions.get_mut(slot).unwrap().sealed = false;
    assert!(world.core.sessions.is_done(slot));
}

#[test]
fn a_large_reply_of_a_client_with_tls_is_not_sent_before_its_worker_has_looked() {
    struct Takes;
    impl Outlet for Takes {
        fn send_now(&mut self, _client: u32, bytes: &[u8]) -> usize {
            bytes.len()
        }
    }
    for encrypted in [false, true] {
        let mut world = World::new(1);
        let slot = world.connect();
        let client = world.core.sessions.get_mut(slot).unwrap();
        client.encrypted = encrypted;
        let (generation, seq) = client.ticket();
        let sessions = &mut world.core.sessions;
        sessions.deliver(slot, generation, seq, &[b'x'; DIRECT_BYTES], &mut Takes);
        world.core.client_hung_up(slot);
        assert_eq!(world.core.sessions.is_done(slot), !encrypted);
        assert!(world.core.sessions.touched.contains(&slot));
    }
}

/// A client of RESP3 that asks to be told.
fn asking(world: &mut World, kind: &str) -> u32 {
    let slot = world.connect();
    assert!(ask(world, slot, "HELLO 3").starts_with('%'));
    let on = format!("CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type {kind}");
    assert_eq!(ask(world, slot, &on), "+OK\r\n");
    slot
}

/// What a client is told within a second.
fn told(world: &mut World, slot: u32) -> String {
    for _ in 0..100 {
        step(world);
    }
    world.take_replies(slot)
}

#[test]
fn who_did_not_ask_hears_nothing_and_goes_after_a_grace() {
    let mut world = World::new(1);
    let slot = world.connect();
    assert_eq!(ask(&mut world, slot, "SET k 1"), "+OK\r\n");
    let off = departure(at("10.0.0.2:1"), 600 * SECOND, &world);
    world.core.depart_all(off);
    let parted_us = parts(&mut world, slot, 10 * SECOND).expect("it goes");
    assert!((2 * SECOND..3 * SECOND).contains(&parted_us), "{parted_us}");
    assert_eq!(world.take_replies(slot), "");
    assert_eq!(world.core.counters.departed, 1);
    // Nobody reads what it sends now, and its side is closed if it does not close it.
    world.send(slot, &command(&["SET", "k", "2"]));
    assert_eq!(world.nodes[0].executed, 1);
    (0..300).for_each(|_| step(&mut world));
    assert!(world.core.sessions.is_empty());
    assert_eq!(world.core.counters.departed_late, 0);
}

#[test]
fn who_asked_is_told_and_has_most_of_its_seconds() {
    let mut world = World::new(1);
    let slot = asking(&mut world, "internal-ip");
    let off = departure(at("10.0.0.2:1"), 600 * SECOND, &world);
    world.core.depart_all(off.clone());
    let push = ">4\r\n$6\r\nMOVING\r\n:7\r\n:30\r\n$10\r\n10.0.0.2:1\r\n";
    assert_eq!(told(&mut world, slot), push);
    assert_eq!(world.core.counters.departures_told, 1);
    assert_eq!(ask(&mut world, slot, "GET k"), "_\r\n".replace('_', "$-1"));
    let parted_us = parts(&mut world, slot, 30 * SECOND).expect("it goes");
    assert!(
        (20 * SECOND..25 * SECOND).contains(&parted_us),
        "{parted_us}"
    );
    assert_eq!(world.take_replies(slot), "", "it is told once");
}

#[test]
fn null_is_only_for_those_who_asked_for_none() {
    let mut world = World::new(1);
    let (none, ip) = (
        asking(&mut world, "none"),
        asking(&mut world, "external-ip"),
    );
    let off = departure(Elsewhere::Anywhere, 8 * SECOND, &world);
    world.core.depart_all(off);
    let push = ">4\r\n$6\r\nMOVING\r\n:7\r\n:1\r\n_\r\n";
    assert_eq!(told(&mut world, none), push);
    assert_eq!(world.take_replies(ip), "");
    assert!(parts(&mut world, ip, 4 * SECOND).is_some());
}

#[test]
fn an_address_that_may_be_wrong_is_not_told() {
    let local: SocketAddr = "10.1.1.1:6379".parse().unwrap();
    for (kind, want) in [
        ("internal-ip", true),
        ("external-ip", false),
        ("internal-fqdn", false),
    ] {
        let mut world = World::new(1);
        let slot = asking(&mut world, kind);
        world.core.sessions.get_mut(slot).unwrap().local = Some(local);
        let off = departure(Elsewhere::Here, 8 * SECOND, &world);
        world.core.depart_all(off);
        assert_eq!(
            told(&mut world, slot).contains("10.1.1.1:6379"),
            want,
            "{kind}"
        );
    }
    // It would keep its port, which is 1 in this world.
    for (library, endpoint, want) in [
        ("redis-py", "h:2", false),
        ("redis-py(a_v1)", "h:1", true),
        ("go-redis", "h:2", true),
    ] {
        let mut world = World::new(1);
        let slot = asking(&mut world, "internal-fqdn");
        ask(
            &mut world,
            slot,
            &format!("CLIENT SETINFO LIB-NAME {library}"),
        );
        let off = departure(at(endpoint), 8 * SECOND, &world);
        world.core.depart_all(off);
        assert_eq!(told(&mut world, slot).contains("MOVING"), want, "{library}");
    }
}

#[test]
fn who_looks_at_names_is_not_told_a_number() {
    for (kind, endpoint, encrypted, want) in [
        ("external-fqdn", "10.0.0.2:1", true, false),
        ("external-fqdn", "[fe80::1]:1", true, false),
        ("external-fqdn", "b.example.org:1", true, true),
        ("external-fqdn", "10.0.0.2:1", false, true),
        ("external-ip", "10.0.0.2:1", true, true),
    ] {
        let mut world = World::new(1);
        let slot = asking(&mut world, kind);
        world.core.sessions.get_mut(slot).unwrap().encrypted = encrypted;
        let off = departure(at(endpoint), 8 * SECOND, &world);
        world.core.depart_all(off);
        let heard = told(&mut world, slot);
        assert_eq!(heard.contains(endpoint), want, "{kind} {endpoint}: {heard}");
    }
}

#[test]
fn who_is_in_the_midst_of_something_stays_until_that_is_over() {
    let mut world = World::new(1);
    let slots: Vec<u32> = (0..4).map(|_| world.connect()).collect();
    let [flight, multi, half, idle] = slots[..] else {
        unreachable!()
    };
    assert_eq!(ask(&mut world, multi, "MULTI"), "+OK\r\n");
    world.send(half, b"*2\r\n$3\r\nGET");
    world.send(flight, &command(&["INCR", "n"]));
    world.obey();
    let off = departure(at("h:1"), 600 * SECOND, &world);
    world.core.depart_all(off);
    assert!(parts(&mut world, idle, 10 * SECOND).is_some());
    for slot in [flight, multi, half] {
        assert_eq!(parts(&mut world, slot, SECOND), None, "{slot}");
    }
    world.settle();
    assert_eq!(world.take_replies(flight), ":1\r\n");
    assert!(parts(&mut world, flight, SECOND).is_some());
    assert_eq!(ask(&mut world, multi, "SET k 1"), "+QUEUED\r\n");
    assert_eq!(parts(&mut world, multi, SECOND), None);
    assert_eq!(ask(&mut world, multi, "EXEC"), "*1\r\n+OK\r\n");
    assert!(parts(&mut world, multi, SECOND).is_some());
    world.send(half, b"\r\n$1\r\nk\r\n");
    world.settle();
    assert_eq!(world.take_replies(half), "$1\r\n1\r\n");
    assert!(parts(&mut world, half, SECOND).is_some());
}

#[test]
fn who_never_pauses_is_closed_between_two_requests_after_a_while() {
    let mut world = World::new(1);
    let slot = world.connect();
    let off = departure(at("h:1"), 600 * SECOND, &world);
    world.core.depart_all(off);
    let (mut asked, began_us) = (0, world.now_us);
    loop {
        let leaves = world
            .core
            .sessions
            .get(slot)
            .is_none_or(|c| c.pause == Pause::Leaving);
        if leaves {
            break;
        }
        asked += 1;
        assert_eq!(ask(&mut world, slot, "INCR n"), format!(":{asked}\r\n"));
        step(&mut world);
        assert!(world.now_us < began_us + 40 * SECOND, "it is never closed");
    }
    assert!(
        world.now_us > began_us + 10 * SECOND,
        "a pipeline could be cut"
    );
    assert_eq!(world.core.counters.departed_late, 0);
}

#[test]
fn idle_ones_go_one_after_the_other() {
    let mut world = World::new(1);
    let slots: Vec<u32> = (0..1000).map(|_| world.connect()).collect();
    let off = departure(at("h:1"), 600 * SECOND, &world);
    world.core.depart_all(off);
    let mut most = 0;
    for _ in 0..1000 {
        let before = world.core.counters.departed;
        step(&mut world);
        most = most.max(world.core.counters.departed - before);
    }
    assert_eq!(world.core.counters.departed, slots.len() as u64);
    assert!(most <= 10, "{most} in 10 ms");
}

#[test]
fn with_little_time_they_go_faster_and_nobody_is_left_at_the_deadline() {
    let mut world = World::new(1);
    let slots: Vec<u32> = (0..1000).map(|_| world.connect()).collect();
    for slot in &slots[..10] {
        assert_eq!(ask(&mut world, *slot, "MULTI"), "+OK\r\n");
    }
    let off = departure(at("h:1"), 4 * SECOND, &world);
    world.core.depart_all(off);
    while world.now_us < 3 * SECOND {
        step(&mut world);
    }
    assert_eq!(world.core.counters.departed, 990);
    let late = world.connect();
    (0..120).for_each(|_| step(&mut world));
    assert!(
        world.core.sessions.get(late).is_none(),
        "who came late goes, too"
    );
    assert!(world.core.sessions.is_empty());
    assert_eq!(world.core.counters.departed_late, 10);
}

#[test]
fn who_may_stay_after_all_stays() {
    let mut world = World::new(1);
    let slot = world.connect();
    let off = departure(Elsewhere::Here, 600 * SECOND, &world);
    world.core.depart_all(off);
    step(&mut world);
    world.core.stay();
    assert_eq!(parts(&mut world, slot, 20 * SECOND), None);
}

#[test]
fn a_client_says_what_it_wants_to_be_told_and_takes_it_back() {
    let mut world = World::new(1);
    let slot = world.connect();
    let on = "CLIENT MAINT_NOTIFICATIONS ON";
    let refused = ask(&mut world, slot, on);
    assert!(
        refused.starts_with("-ERR") && refused.contains("RESP3"),
        "{refused}"
    );
    assert!(ask(&mut world, slot, "HELLO 3").starts_with('%'));
    for line in [
        "client maint_notifications on",
        "CLIENT MAINT_NOTIFICATIONS ON Moving-Endpoint-Type External-FQDN",
        "CLIENT MAINT_NOTIFICATIONS OFF",
        on,
    ] {
        assert_eq!(ask(&mut world, slot, line), "+OK\r\n", "{line}");
    }
    for line in [
        "CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type public",
        "CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type",
        "CLIENT MAINT_NOTIFICATIONS OFF moving-endpoint-type none",
        "CLIENT MAINT_NOTIFICATIONS perhaps",
        "CLIENT MAINT_NOTIFICATIONS",
    ] {
        let refused = ask(&mut world, slot, line);
        assert!(refused.starts_with("-ERR"), "{line}: {refused}");
    }
    let wants = |world: &World| {
        world
            .core
            .sessions
            .get(slot)
            .unwrap()
            .state
            .moving
            .is_some()
    };
    assert!(wants(&world));
    for end in ["RESET", "HELLO 2"] {
        assert!(ask(&mut world, slot, "HELLO 3").starts_with('%'));
        assert_eq!(ask(&mut world, slot, on), "+OK\r\n");
        ask(&mut world, slot, end);
        assert!(!wants(&world), "{end}");
    }
}

#[test]
fn who_asks_when_it_is_to_go_already_is_told_at_once() {
    let mut world = World::new(1);
    let slot = world.connect();
    let off = departure(at("h:1"), 600 * SECOND, &world);
    world.core.depart_all(off);
    assert!(ask(&mut world, slot, "HELLO 3").starts_with('%'));
    let on = ask(&mut world, slot, "CLIENT MAINT_NOTIFICATIONS ON");
    assert_eq!(on, "+OK\r\n");
    assert!(told(&mut world, slot).contains("MOVING"));
    assert_eq!(
        parts(&mut world, slot, 20 * SECOND),
        None,
        "it has time to go"
    );
}
