//! The files of a definition as blocks and attributes, whether HCL or its JSON form.

use std::{ops::Range, sync::Arc};

use hcl_edit::{Span as _, expr::Expression, structure::Body};
use shipway_fault::{Detail, Fault, Position, SourceFile, Span};

use crate::{
    json::Json,
    nesting,
    problem::{Outcome, Problem, SourceRange},
};

/// Bytes of a file, at most.
pub const MAX_FILE: usize = 4 << 20;

enum Tree {
    Hcl(Body),
    Json(Json),
}

/// A file that was read.
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
    tree: Tree,
}

impl Source {
    /// `text` in HCL. `number` is the index that it will have among the sources.
    pub(crate) fn hcl(name: &str, text: &str, number: usize) -> Result<Self, Box<(Self, Problem)>> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let made = |tree| Self { name: name.to_owned(), text: text.to_owned(), tree };
        let parsed = nesting::check(text).map_err(|why| (why, 0)).and_then(|()| {
            hcl_edit::parser::parse_body(text)
                .map_err(|e| (e.message().to_owned(), e.location().offset()))
        });
        match parsed {
            Ok(body) => Ok(made(Tree::Hcl(body))),
            Err((why, at)) => {
                let end =
                    text[at.min(text.len())..].chars().next().map_or(at, |c| at + c.len_utf8());
                let place = SourceRange { source: number, bytes: at..end };
                let problem = Problem::new("Invalid HCL", why).at(Some(place));
                Err(Box::new((made(Tree::Json(Json::Null)), *problem)))
            }
        }
    }

    /// `text` in JSON.
    pub(crate) fn json(name: &str, text: &str) -> Result<Self, Box<Problem>> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let json: Json = serde_json::from_str(text)
            .map_err(|e| Problem::new("Invalid JSON", format!("{name}: {e}")))?;
        Ok(Self { name: name.to_owned(), text: text.to_owned(), tree: Tree::Json(json) })
    }

    /// All of it.
    pub(crate) fn body(&self, number: usize) -> Outcome<BlockBody<'_>> {
        match &self.tree {
            Tree::Hcl(body) => Ok(BlockBody::Hcl(body, number)),
            Tree::Json(json) => BlockBody::of_json(json, number),
        }
    }
}

/// An expression of a source.
#[derive(Clone, Copy)]
pub(crate) enum Expr<'a> {
    Hcl(&'a Expression, usize),
    Json(&'a Json, usize),
}

impl Expr<'_> {
    pub(crate) fn place(&self) -> Option<SourceRange> {
        match self {
            Self::Hcl(expression, source) => place(*expression, *source),
            Self::Json(..) => None,
        }
    }
}

pub(crate) fn place(spanned: &impl hcl_edit::Span, source: usize) -> Option<SourceRange> {
    spanned.span().map(|bytes| SourceRange { source, bytes })
}

/// An attribute: what it is called and what it is.
#[derive(Clone, Copy)]
pub(crate) struct Attribute<'a> {
    pub(crate) name: &'a str,
    pub(crate) expr: Expr<'a>,
}

/// A block.
pub(crate) struct Block<'a> {
    pub(crate) labels: Vec<&'a str>,
    pub(crate) body: BlockBody<'a>,
    pub(crate) place: Option<SourceRange>,
}

/// What is between the braces of a block, or a file.
#[derive(Clone)]
pub(crate) enum BlockBody<'a> {
    Hcl(&'a Body, usize),
    /// Members of one object, or of several that count as one.
    Json(Vec<&'a (crate::json::Text, Json)>, usize),
}

impl<'a> BlockBody<'a> {
    fn of_json(json: &'a Json, source: usize) -> Outcome<Self> {
        let mut members = Vec::new();
        let mut add = |json: &'a Json| match json {
            Json::Object(of) => {
                members.extend(of);
                Ok(())
            }
            _ => Err(Problem::new(
                "Incorrect JSON value type",
                "Either a JSON object or JSON array of objects is required here, to specify the arguments and child blocks for this block.",
            )),
        };
        match json {
            Json::Array(list) => list.iter().try_for_each(&mut add)?,
            Json::Null => {}
            other => add(other)?,
        }
        Ok(Self::Json(members, source))
    }

    /// The attribute `name`.
    pub(crate) fn attribute(&self, name: &str) -> Option<Attribute<'a>> {
        match self {
            Self::Hcl(body, source) => body
                .get_attribute(name)
                .map(|a| Attribute { name: a.key.as_str(), expr: Expr::Hcl(&a.value, *source) }),
            Self::Json(members, source) => {
                members.iter().rev().find(|(key, _)| key.raw == name).map(|(key, value)| {
                    Attribute { name: &key.raw, expr: Expr::Json(value, *source) }
                })
            }
        }
    }

    /// All attributes. In JSON everything is one that is not named as a block.
    pub(crate) fn attributes(&self) -> Vec<Attribute<'a>> {
        match self {
            Self::Hcl(body, source) => body
                .attributes()
                .map(|a| Attribute { name: a.key.as_str(), expr: Expr::Hcl(&a.value, *source) })
                .collect(),
            Self::Json(members, source) => members
                .iter()
                .filter(|(key, _)| key.raw != "//")
                .map(|(key, value)| Attribute { name: &key.raw, expr: Expr::Json(value, *source) })
                .collect(),
        }
    }

    /// The blocks of `kind`, which have `labels` labels.
    pub(crate) fn blocks(&self, kind: &str, labels: usize) -> Outcome<Vec<Block<'a>>> {
        let mut found = Vec::new();
        match self {
            Self::Hcl(body, source) => {
                for block in body.blocks().filter(|b| b.ident.as_str() == kind) {
                    let names: Vec<&str> = block.labels.iter().map(|l| l.as_str()).collect();
                    let place = head(block, *source);
                    if names.len() < labels {
                        let why = format!("All {kind} blocks must have {labels} labels (name).");
                        return Err(
                            Problem::new(&format!("Missing name for {kind}"), why).at(place)
                        );
                    }
                    if names.len() > labels {
                        let why = match labels {
                            0 => format!("No labels are expected for {kind} blocks."),
                            _ => format!(
                                "Only {labels} labels (name) are expected for {kind} blocks."
                            ),
                        };
                        return Err(
                            Problem::new(&format!("Extraneous label for {kind}"), why).at(place)
                        );
                    }
                    let body = Self::Hcl(&block.body, *source);
                    found.push(Block { labels: names, body, place });
                }
            }
            Self::Json(members, source) => {
                for (_, value) in members.iter().filter(|(key, _)| key.raw == kind) {
                    json_blocks(value, labels, *source, &mut Vec::new(), &mut found)?;
                }
            }
        }
        Ok(found)
    }
}

/// The block's first line: type and labels.
fn head(block: &hcl_edit::structure::Block, source: usize) -> Option<SourceRange> {
    let start = block.ident.span().or_else(|| block.span())?.start;
    let last = block.labels.last().and_then(|label| match label {
        hcl_edit::structure::BlockLabel::Ident(i) => i.span(),
        hcl_edit::structure::BlockLabel::String(s) => s.span(),
    });
    let bytes: Range<usize> = start..last.or_else(|| block.ident.span())?.end;
    Some(SourceRange { source, bytes })
}

/// Members are labels until there are enough of them; then there are bodies.
fn json_blocks<'a>(
    json: &'a Json,
    labels: usize,
    source: usize,
    names: &mut Vec<&'a str>,
    found: &mut Vec<Block<'a>>,
) -> Outcome<()> {
    if names.len() == labels {
        let mut add = |body| -> Outcome<()> {
            let body = BlockBody::of_json(body, source)?;
            found.push(Block { labels: names.clone(), body, place: None });
            Ok(())
        };
        return match json {
            Json::Array(list) => list.iter().try_for_each(add),
            Json::Null => Ok(()),
            other => add(other),
        };
    }
    let BlockBody::Json(members, _) = BlockBody::of_json(json, source)? else { return Ok(()) };
    for (key, value) in members.into_iter().filter(|(key, _)| key.raw != "//") {
        names.push(&key.raw);
        json_blocks(value, labels, source, names, found)?;
        names.pop();
    }
    Ok(())
}

impl Problem {
    /// The fault for users, with the lines it is about.
    pub(crate) fn into_fault(self, sources: &[Source]) -> Fault {
        let Some((source, bytes)) =
            self.place.and_then(|p| Some((sources.get(p.source)?, p.bytes)))
        else {
            return Fault::invalid(self.text);
        };
        let (start, end) = (position(&source.text, bytes.start), position(&source.text, bytes.end));
        let columns = match start.line == end.line {
            true => format!("{},{}-{}", start.line, start.character + 1, end.character + 1),
            false => {
                let (a, b) = (start.character + 1, end.character + 1);
                format!("{},{a}-{},{b}", start.line, end.line)
            }
        };
        let file = SourceFile {
            filename: source.name.clone(),
            language: "HCL".into(),
            data: source.text.clone().into_bytes(),
            definition: None,
        };
        Fault::invalid(format!("{}:{columns}: {}", source.name, self.text))
            .detail(Detail::Source { file: Arc::new(file), spans: vec![Span { start, end }] })
    }
}

fn position(text: &str, at: usize) -> Position {
    let before = text.get(..at.min(text.len())).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |n| n + 1);
    let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    Position {
        line: number(1 + before.matches('\n').count()),
        character: number(before[line_start..].chars().count()),
    }
}
