//! Which variables and functions an expression asks for, so that these can be evaluated first.

use hcl_edit::{
    expr::{Expression, ObjectKey, Traversal, TraversalOperator},
    template::{Directive, Element, Template},
};

use crate::{json::Json, source::Expr};

/// What an expression asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names<'e> {
    pub(crate) functions: Vec<&'e str>,
    /// Variables, each with the first two attributes that are asked of it.
    pub(crate) variables: Vec<(&'e str, Option<&'e str>, Option<&'e str>)>,
}

/// The names in `expr`.
pub(crate) fn of(expr: Expr<'_>) -> Names<'_> {
    let mut names = Names::default();
    match expr {
        Expr::Hcl(expression, _) => names.expression(expression, &mut Vec::new()),
        Expr::Json(json, _) => names.json(json),
    }
    names
}

impl<'e> Names<'e> {
    fn json(&mut self, json: &'e Json) {
        let mut text = |text: &'e crate::json::Text| {
            if let Ok(template) = &text.template {
                self.template(template, &mut Vec::new());
            }
        };
        match json {
            Json::Null | Json::Bool(_) | Json::Number(_) => {}
            Json::Text(t) => text(t),
            Json::Array(list) => list.iter().for_each(|v| self.json(v)),
            Json::Object(members) => {
                for (name, value) in members {
                    if let Ok(template) = &name.template {
                        self.template(template, &mut Vec::new());
                    }
                    self.json(value);
                }
            }
        }
    }

    fn variable(
        &mut self,
        root: &'e str,
        first: Option<&'e str>,
        second: Option<&'e str>,
        own: &[&'e str],
    ) {
        if !own.contains(&root) {
            self.variables.push((root, first, second));
        }
    }

    /// `own` are the variables of surrounding `for`s.
    fn expression(&mut self, expression: &'e Expression, own: &mut Vec<&'e str>) {
        match expression {
            Expression::Null(_)
            | Expression::Bool(_)
            | Expression::Number(_)
            | Expression::String(_) => {}
            Expression::Array(array) => array.iter().for_each(|e| self.expression(e, own)),
            Expression::Object(object) => {
                for (key, value) in object.iter() {
                    if let ObjectKey::Expression(key) = key {
                        self.expression(key, own);
                    }
                    self.expression(value.expr(), own);
                }
            }
            Expression::StringTemplate(template) => {
                template.iter().for_each(|e| self.element(e, own));
            }
            Expression::HeredocTemplate(heredoc) => self.template(&heredoc.template, own),
            Expression::Parenthesis(inner) => self.expression(inner.inner(), own),
            Expression::Variable(name) => self.variable(name.as_str(), None, None, own),
            Expression::Conditional(c) => {
                self.expression(&c.cond_expr, own);
                self.expression(&c.true_expr, own);
                self.expression(&c.false_expr, own);
            }
            Expression::FuncCall(call) => {
                self.functions.push(call.name.name.as_str());
                // The type that is passed to `convert` is not an expression.
                let is_type = |n: usize| n == 1 && call.name.name.as_str() == "convert";
                for (_, arg) in call.args.iter().enumerate().filter(|(n, _)| !is_type(*n)) {
                    self.expression(arg, own);
                }
            }
            Expression::Traversal(traversal) => self.traversal(traversal, own),
            Expression::UnaryOp(op) => self.expression(&op.expr, own),
            Expression::BinaryOp(op) => {
                self.expression(&op.lhs_expr, own);
                self.expression(&op.rhs_expr, own);
            }
            Expression::ForExpr(each) => {
                self.expression(&each.intro.collection_expr, own);
                let before = own.len();
                own.extend(each.intro.key_var.as_ref().map(|k| k.as_str()));
                own.push(each.intro.value_var.as_str());
                if let Some(key) = &each.key_expr {
                    self.expression(key, own);
                }
                self.expression(&each.value_expr, own);
                if let Some(condition) = &each.cond {
                    self.expression(&condition.expr, own);
                }
                own.truncate(before);
            }
        }
    }

    fn traversal(&mut self, traversal: &'e Traversal, own: &mut Vec<&'e str>) {
        let step = |n: usize| match traversal.operators.get(n).map(|o| o.value()) {
            Some(TraversalOperator::GetAttr(name)) => Some(name.as_str()),
            Some(TraversalOperator::Index(Expression::String(name))) => Some(name.as_str()),
            _ => None,
        };
        match &traversal.expr {
            Expression::Variable(root) => {
                let first = step(0);
                self.variable(root.as_str(), first, first.and_then(|_| step(1)), own);
            }
            other => self.expression(other, own),
        }
        for operator in &traversal.operators {
            if let TraversalOperator::Index(key) = operator.value() {
                self.expression(key, own);
            }
        }
    }

    fn template(&mut self, template: &'e Template, own: &mut Vec<&'e str>) {
        template.iter().for_each(|e| self.element(e, own));
    }

    fn element(&mut self, element: &'e Element, own: &mut Vec<&'e str>) {
        match element {
            Element::Literal(_) => {}
            Element::Interpolation(of) => self.expression(&of.expr, own),
            Element::Directive(directive) => match &**directive {
                Directive::If(of) => {
                    self.expression(&of.if_expr.cond_expr, own);
                    self.template(&of.if_expr.template, own);
                    if let Some(other) = &of.else_expr {
                        self.template(&other.template, own);
                    }
                }
                Directive::For(of) => {
                    self.expression(&of.for_expr.collection_expr, own);
                    let before = own.len();
                    own.extend(of.for_expr.key_var.as_ref().map(|k| k.as_str()));
                    own.push(of.for_expr.value_var.as_str());
                    self.template(&of.for_expr.template, own);
                    own.truncate(before);
                }
            },
        }
    }
}
