//! Clients with TLS, at the port of those without: what they get, and what is refused.

#![allow(clippy::unwrap_used)] // tests may, and so may what only tests use

mod support;

use std::io::{BufRead as _, Write as _};
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser as _;
use rustls::ClientConfig;
use rustls::crypto::ring::cipher_suite;
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use slotmesh_proxy::app::App;
use slotmesh_proxy::settings::{Flags, Settings};
use support::LIMIT;
use support::fixture::{Fixture, fixture_with};
use support::raw::Raw;
use support::talk::Talk;
use support::tls::{Certificate, tunnel};

/// Two shards behind a proxy with a certificate.
async fn fixture(flags: &[&str]) -> (Fixture, Certificate, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let certificate = Certificate::make(dir.path());
    let flags = [&certificate.flags(), flags].concat();
    (fixture_with(2, 2, &flags).await, certificate, dir)
}

/// The end of a connection: closed in order or by force.
async fn is_closed(raw: &mut Raw) -> bool {
    use tokio::io::AsyncReadExt as _;
    let mut rest = Vec::new();
    let end = tokio::time::timeout(LIMIT, raw.stream.read_to_end(&mut rest)).await;
    end.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_of_every_kind_work_by_every_suite_beside_clients_without_tls() {
    let (fixture, certificate, _dir) = fixture(&[]).await;
    let suites = [
        (&TLS13, cipher_suite::TLS13_AES_128_GCM_SHA256),
        (&TLS13, cipher_suite::TLS13_AES_256_GCM_SHA384),
        (&TLS13, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256),
        (
            &TLS12,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        ),
        (
            &TLS12,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        ),
        (
            &TLS12,
            cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
        ),
    ];
    let mut plain = fixture.talk().await;
    for (n, (version, suite)) in suites.into_iter().enumerate() {
        let address = tunnel(
            fixture.proxy.address,
            certificate.config(version, Some(suite)),
        )
        .await;
        let mut talk = Talk::connect(address).await;
        talk.expect(&format!("SET k {n}"), "+OK\r\n").await;
        plain.expect("GET k", &format!("$1\r\n{n}\r\n")).await;
        let big = n.to_string().repeat(16 * 1024 * 1024);
        talk.tell(&["SET", "big", &big]).await;
        assert_eq!(talk.hear().await, "+OK\r\n");
        assert_eq!(talk.ask("GET big").await.len(), big.len() + 13);
        talk.expect("MULTI", "+OK\r\n").await;
        talk.expect("INCR k", "+QUEUED\r\n").await;
        talk.expect("EXEC", &format!("*1\r\n:{}\r\n", n + 1)).await;
        talk.say("BLPOP q 0").await;
        plain.expect("RPUSH q x", ":1\r\n").await;
        assert_eq!(talk.hear().await, "*2\r\n$1\r\nq\r\n$1\r\nx\r\n");
        let mut listener = Talk::connect(address).await;
        listener.ask("SUBSCRIBE news").await;
        talk.expect("PUBLISH news x", ":1\r\n").await;
        assert!(listener.hear().await.contains("message"));
        let mut raw = Raw::connect(address).await;
        raw.send("PING\r\n".repeat(5000).as_bytes()).await;
        raw.expect(&"+PONG\r\n".repeat(5000)).await;
        raw.send(b"QUIT\r\n").await;
        raw.expect("+OK\r\n").await;
        assert_eq!(raw.rest().await, "");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_tls_is_required_others_are_told_so_and_closed() {
    let (fixture, certificate, _dir) = fixture(&["--tls-required"]).await;
    let mut raw = Raw::connect(fixture.proxy.address).await;
    raw.send(b"PING\r\n").await;
    let said = raw.rest().await;
    assert_eq!(said, "-ERR this port only takes TLS connections\r\n");
    let address = tunnel(fixture.proxy.address, certificate.config(&TLS13, None)).await;
    let mut talk = Talk::connect(address).await;
    talk.expect("PING", "+PONG\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_version_is_refused_where_the_new_one_is_asked_for() {
    let (fixture, certificate, _dir) = fixture(&["--tls-min-version", "1.3"]).await;
    let old = tunnel(fixture.proxy.address, certificate.config(&TLS12, None)).await;
    let mut raw = Raw::connect(old).await;
    assert!(is_closed(&mut raw).await);
    let new = tunnel(fixture.proxy.address, certificate.config(&TLS13, None)).await;
    Talk::connect(new).await.expect("PING", "+PONG\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_is_closed_at_once_and_half_a_handshake_when_its_time_is_over() {
    let (fixture, certificate, _dir) = fixture(&[]).await;
    let began = Instant::now();
    let mut halves = Vec::new();
    for bytes in [&b"\x16"[..], b"\x16\x03\x01\x02\x00\x01\x00"] {
        let mut raw = Raw::connect(fixture.proxy.address).await;
        raw.send(bytes).await;
        halves.push(raw);
    }
    let nonsense: [&[u8]; 4] = [
        b"\x16GET k\r\n",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x04\x09\x00\x00\x00",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
    ];
    for bytes in nonsense {
        let mut raw = Raw::connect(fixture.proxy.address).await;
        raw.send(bytes).await;
        assert!(is_closed(&mut raw).await, "{bytes:?}");
    }
    // A handshake without end: whole records, never the last.
    let mut endless = Raw::connect(fixture.proxy.address).await;
    let mut record = vec![0x16, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff];
    record.resize(5 + 0x4000, 0);
    for _ in 0..8 {
        use tokio::io::AsyncWriteExt as _;
        // It may be closed by now.
        let _ = endless.stream.write_all(&record).await;
    }
    assert!(is_closed(&mut endless).await);
    let at_once = began.elapsed();
    assert!(at_once < Duration::from_secs(9), "{at_once:?}");
    for mut half in halves {
        assert!(is_closed(&mut half).await);
    }
    assert!(began.elapsed() >= Duration::from_secs(9), "they had time");
    let address = tunnel(fixture.proxy.address, certificate.config(&TLS13, None)).await;
    Talk::connect(address)
        .await
        .expect("PING", "+PONG\r\n")
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_whose_bytes_come_one_by_one_is_a_session() {
    let (fixture, certificate, _dir) = fixture(&[]).await;
    for version in [&TLS13, &TLS12] {
        let (address, config) = (fixture.proxy.address, certificate.config(version, None));
        let said = tokio::task::spawn_blocking(move || {
            let name = ServerName::from(address.ip());
            let mut client = rustls::ClientConnection::new(config, name).unwrap();
            let mut socket = std::net::TcpStream::connect(address).unwrap();
            socket.set_nodelay(true).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            client.writer().write_all(b"PING\r\nECHO x\r\n").unwrap();
            let mut said = Vec::new();
            while said.len() < 14 {
                let mut bytes = Vec::new();
                while client.wants_write() {
                    client.write_tls(&mut bytes).unwrap();
                }
                for byte in bytes {
                    socket.write_all(&[byte]).unwrap();
                }
                assert!(client.read_tls(&mut socket).unwrap() > 0, "closed");
                client.process_new_packets().unwrap();
                // Nothing yet is no error here.
                let _ = std::io::Read::read_to_end(&mut client.reader(), &mut said);
            }
            String::from_utf8(said).unwrap()
        });
        assert_eq!(said.await.unwrap(), "+PONG\r\n$1\r\nx\r\n");
    }
}

/// Asks this and says that nothing more comes: in the same write, or when the reply has begun, and then
/// does this before it reads on. Returns all that is said to it.
fn ask_last(
    address: SocketAddr,
    config: Arc<ClientConfig>,
    words: &str,
    before_it_reads: Option<impl FnOnce()>,
) -> String {
    let name = ServerName::from(address.ip());
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    socket.connect(&address.into()).unwrap();
    let mut socket = std::net::TcpStream::from(socket);
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    while client.is_handshaking() {
        client.complete_io(&mut socket).unwrap();
    }
    client.writer().write_all(words.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    if before_it_reads.is_some() {
        while client.wants_write() {
            client.write_tls(&mut socket).unwrap();
        }
        assert_eq!(socket.peek(&mut [0]).unwrap(), 1);
    }
    client.send_close_notify();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    socket.write_all(&bytes).unwrap();
    if let Some(first) = before_it_reads {
        first();
    }
    let mut said = String::new();
    let mut session = rustls::StreamOwned::new(client, socket);
    let end = std::io::Read::read_to_string(&mut session, &mut said);
    end.unwrap_or_else(|error| panic!("waited for the end, heard {}: {error}", said.len()));
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_with_the_last_word_is_executed_and_a_wait_in_it_is_given_up() {
    let (fixture, certificate, _dir) = fixture(&[]).await;
    for version in [&TLS13, &TLS12] {
        let cases = [
            // More than may be in flight at a time.
            ("INCR n\r\n".repeat(5000), 5000),
            ("INCR n\r\nBLPOP q 0\r\n".to_owned(), 1),
            (
                "HELLO 2\r\nSETRANGE s 900000 x\r\nGET s\r\nPING\r\n".to_owned(),
                0,
            ),
        ];
        for (words, replies) in cases {
            let (address, config) = (fixture.proxy.address, certificate.config(version, None));
            let at_once = None::<fn()>;
            let said = tokio::task::block_in_place(|| ask_last(address, config, &words, at_once));
            if replies > 0 {
                assert_eq!(said.lines().count(), replies, "{said:.200}");
            } else {
                assert!(said.len() > 900_000 && said.ends_with("+PONG\r\n"));
            }
        }
    }
    let mut plain = fixture.talk().await;
    plain.expect("GET n", "$5\r\n10002\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reply_reaches_whole_who_has_said_its_last_word_whatever_of_it_waits() {
    let (fixture, certificate, _dir) = fixture(&[]).await;
    let mut plain = fixture.talk().await;
    plain.ask("SETRANGE s 5000000 x").await;
    // So many pieces, as they are sealed, are the whole reply: the last of one of them does not find room
    // on its way to a client that does not read.
    for pieces in 1..=76 {
        let all: usize = pieces * 64 * 1024;
        let len = all - all.to_string().len() - "$\r\n\r\n".len();
        let (address, config) = (fixture.proxy.address, certificate.config(&TLS13, None));
        let words = format!("GETRANGE s 1 {len}\r\n");
        // Every worker answers this, so it has heard what came before.
        let is_heard = || {
            let asked = async { plain.ask("CLIENT LIST").await };
            tokio::runtime::Handle::current().block_on(asked);
        };
        let ask = || ask_last(address, config, &words, Some(is_heard));
        let said = tokio::task::block_in_place(ask);
        assert_eq!(said.len(), all);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_changes_its_keys_in_a_session_with_us() {
    let (fixture, certificate, _dir) = fixture(&[]).await;
    let address = fixture.proxy.address.to_string();
    let talk = tokio::task::spawn_blocking(move || {
        // It says on stderr what it does at a command.
        let mut child = Command::new("sh")
            .args(["-c", "exec openssl \"$@\" 2>&1", "sh"])
            .args(["s_client", "-crlf", "-tls1_3", "-verify_return_error"])
            .args(["-connect", &address, "-CAfile"])
            .arg(&certificate.cert)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut lines = output.split(b'\n').map(|line| {
            let line = line.unwrap();
            String::from_utf8_lossy(&line).trim_end().to_owned()
        });
        let mut wait = |what: &str| assert!(lines.any(|line| line.contains(what)), "{what}");
        for (n, word) in ["", "K", "k", "K"].into_iter().enumerate() {
            if !word.is_empty() {
                // A line of its own is a command to it.
                input.write_all(format!("{word}\n").as_bytes()).unwrap();
                wait("KEYUPDATE");
            }
            input
                .write_all(format!("ECHO said:{n}\n").as_bytes())
                .unwrap();
            wait(&format!("said:{n}"));
        }
        drop(input);
        let _ = child.kill();
        child.wait().unwrap();
    });
    tokio::time::timeout(3 * LIMIT, talk)
        .await
        .expect("waited for openssl")
        .unwrap();
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_with_what_to_do() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [one, other] = [0, 1].map(|n| Certificate::make(dirs[n].path()));
    let missing = dirs[0].path().join("none.pem");
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let cases = [
        (text(&missing), text(&one.key), "must be a PEM file"),
        (text(&one.cert), text(&missing), "must be a PEM file"),
        (text(&one.key), text(&one.key), "holds no certificate"),
        (text(&one.cert), text(&one.cert), "must be a PEM file"),
        (
            text(&one.cert),
            text(&other.key),
            "two that belong together",
        ),
    ];
    for (cert, key, want) in cases {
        let data = tempfile::tempdir().unwrap();
        let data = data.path().to_str().unwrap();
        let words = ["slotmesh-proxy", "--proxy-id", "p", "--instance", "i"];
        let own = ["--data", data, "--tls-cert", &cert, "--tls-key", &key];
        let flags = Flags::try_parse_from([&words[..], &own[..]].concat()).unwrap();
        let error = App::bind(Settings::load(flags).unwrap()).await.unwrap_err();
        assert!(error.to_string().contains(want), "{error}");
    }
}
