//! Values: what Redis writes is what we read, and what we write reads back.

use proptest::prelude::*;

use super::*;

fn decode(text: &str) -> Value {
    let (value, consumed) = Value::decode(text.as_bytes()).unwrap().unwrap();
    assert_eq!(consumed, text.len(), "{text:?}");
    value
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.as_bytes().to_vec())
}

#[test]
fn every_type_is_decoded() {
    let cases = [
        ("+OK\r\n", Value::Simple("OK".into())),
        ("-ERR x y\r\n", Value::Error("ERR x y".into())),
        ("!5\r\nERR x\r\n", Value::Error("ERR x".into())),
        (":-7\r\n", Value::Int(-7)),
        ("$3\r\na\r\n\r\n", bulk("a\r\n")),
        ("$-1\r\n", Value::Null),
        ("*-1\r\n", Value::Null),
        ("_\r\n", Value::Null),
        ("#t\r\n", Value::Bool(true)),
        (",2.5\r\n", Value::Double(2.5)),
        (",-inf\r\n", Value::Double(f64::NEG_INFINITY)),
        ("(123\r\n", Value::BigNumber("123".into())),
        (
            "=7\r\ntxt:abc\r\n",
            Value::Verbatim {
                format: *b"txt",
                text: b"abc".to_vec(),
            },
        ),
        (
            "*2\r\n:1\r\n*0\r\n",
            Value::Array(vec![Value::Int(1), Value::Array(vec![])]),
        ),
        ("~1\r\n:1\r\n", Value::Set(vec![Value::Int(1)])),
        (">1\r\n+x\r\n", Value::Push(vec![Value::Simple("x".into())])),
        (
            "%1\r\n+k\r\n:1\r\n",
            Value::Map(vec![(Value::Simple("k".into()), Value::Int(1))]),
        ),
        ("|1\r\n+ttl\r\n:1\r\n$1\r\nv\r\n", bulk("v")),
    ];
    for (text, value) in cases {
        assert_eq!(decode(text), value, "{text:?}");
        for cut in 0..text.len() {
            assert_eq!(
                Value::decode(&text.as_bytes()[..cut]),
                Ok(None),
                "{text:?} cut at {cut}"
            );
        }
    }
}

#[test]
fn attributes_are_dropped_wherever_they_stand() {
    let attribute = "|1\r\n+ttl\r\n*1\r\n:1\r\n";
    let list = Value::Array(vec![Value::Int(1), Value::Int(2)]);
    assert_eq!(
        decode(&format!(
            "{attribute}*2\r\n{attribute}:1\r\n{attribute}:2\r\n"
        )),
        list
    );
    let map = Value::Map(vec![(bulk("k"), Value::Null)]);
    assert_eq!(
        decode(&format!("%1\r\n{attribute}$1\r\nk\r\n{attribute}_\r\n")),
        map
    );
}

#[test]
fn depth_is_bounded_and_announced_sizes_are_not_believed() {
    let fits = ["*1\r\n".repeat(DEPTH_MAX as usize), ":1\r\n".into()].concat();
    assert!(Value::decode(fits.as_bytes()).is_ok());
    let deep = ["*1\r\n".repeat(DEPTH_MAX as usize + 1), ":1\r\n".into()].concat();
    assert_eq!(Value::decode(deep.as_bytes()), Err(ProtocolError::TooDeep));
    let attributes = ["|0\r\n".repeat(100_000), ":1\r\n".into()].concat();
    assert_eq!(
        Value::decode(attributes.as_bytes()),
        Err(ProtocolError::TooDeep)
    );
    assert_eq!(Value::decode(b"*4294967295\r\n:1\r\n"), Ok(None));
}

#[test]
fn resp2_clients_get_what_redis_gives_them() {
    let value = Value::Array(vec![
        Value::Null,
        Value::Bool(true),
        Value::Double(1.5),
        Value::Map(vec![(bulk("k"), Value::Int(1))]),
        Value::Set(vec![bulk("m")]),
        Value::Verbatim {
            format: *b"txt",
            text: b"t".to_vec(),
        },
        Value::BigNumber("12".into()),
    ]);
    let mut out = Vec::new();
    value.encode(&mut out, Protocol::Resp2);
    let expected = "*7\r\n$-1\r\n:1\r\n$3\r\n1.5\r\n*2\r\n$1\r\nk\r\n:1\r\n*1\r\n$1\r\nm\r\n\
                    $1\r\nt\r\n$2\r\n12\r\n";
    assert_eq!(String::from_utf8(out).unwrap(), expected);
}

#[test]
fn an_error_is_one_line_whatever_is_in_it() {
    let mut out = Vec::new();
    crate::write::write_error(&mut out, "ERR bad 'a\r\n+OK'");
    assert_eq!(out, b"-ERR bad 'a  +OK'\r\n");
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        "[a-zA-Z0-9 ]{0,10}".prop_map(Value::Simple),
        "[A-Z]{1,5} [a-z ]{0,9}".prop_map(Value::Error),
        any::<i64>().prop_map(Value::Int),
        proptest::collection::vec(any::<u8>(), 0..20).prop_map(Value::Bulk),
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        (-1e9f64..1e9).prop_map(Value::Double),
        "[0-9]{1,30}".prop_map(Value::BigNumber),
    ];
    leaf.prop_recursive(4, 30, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::Array),
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::Set),
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::Push),
            proptest::collection::vec((inner.clone(), inner), 0..5).prop_map(Value::Map),
        ]
    })
}

proptest! {
    #[test]
    fn resp3_round_trips(value in value()) {
        let mut out = Vec::new();
        value.encode(&mut out, Protocol::Resp3);
        let len = out.len();
        out.extend_from_slice(b"+next\r\n");
        prop_assert_eq!(Value::decode(&out), Ok(Some((value, len))));
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Value::decode(&bytes);
    }
}
